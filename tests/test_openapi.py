"""The document at ``/openapi.json``: valid, complete, and true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate
from processes import serve
from sqlalchemy.orm import scoped_session, sessionmaker
from support import environ, serve_once

from resources import Filter, clean_name, make_app
from web.router import Router
from web.validation import InvalidField

pytestmark = pytest.mark.long

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = 20
"""Requests that are made up for each operation."""


@pytest.fixture
def router() -> Router:
    return make_app(scoped_session(sessionmaker()))


@pytest.fixture(scope="module")
def document() -> Any:
    router = make_app(scoped_session(sessionmaker()))
    return json.loads(serve_once(router, environ("GET", "/openapi.json")).content)


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield path, method and operation of all that is described."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method.upper(), operation


def resolved(document: Any, part: Any) -> Any:
    """Follow a reference within the document."""
    for name in part.get("$ref", "#").split("/")[1:]:
        document = document[name]
    return document if "$ref" in part else part


def test_it_is_valid(document: Any) -> None:
    """It is an OpenAPI 3.1 document by the field's own validator."""
    validate(document)
    assert document["openapi"].startswith("3.1.")


def test_its_server_is_where_it_is(document: Any) -> None:
    """The server is the folder that the document is in, whatever a proxy has made of its URL."""
    assert [server["url"] for server in document["servers"]] == ["."]


def test_it_has_every_method_of_every_json_resource(router: Router, document: Any) -> None:
    """What returns JSON is described, but for the document itself; and nothing else is."""
    described = {(path, method) for path, method, _ in operations(document)}
    served = {
        (path, method)
        for path, resource in router.resources.items()
        for method, routes in resource.methods.items()
        if "application/json" in routes and path != "/openapi.json"
    }
    assert described == served


def test_each_operation_says_what_it_does(document: Any) -> None:
    """Each operation has a name of its own, a tag, a summary and a description."""
    described = [operation for _, _, operation in operations(document)]
    assert len({operation["operationId"] for operation in described}) == len(described)
    tags = {tag["name"] for tag in document["tags"]}
    for operation in described:
        assert {*operation["tags"]} <= tags
        assert operation["summary"]
        assert operation["description"].endswith(".")


def test_its_bodies_are_those_that_handlers_take(router: Router, document: Any) -> None:
    """Each body has the members of the handler's struct, and each query its parameters."""
    for path, method, operation in operations(document):
        route = router.resources[path].methods[method]["application/json"]
        parameters = [resolved(document, part) for part in operation.get("parameters", [])]
        query = {part["name"] for part in parameters if part["in"] == "query"}
        assert query == {*(route.query.__struct_fields__ if route.query else ())}
        assert ("requestBody" in operation) == (route.body is not None)
        if route.body is not None:
            for content in operation["requestBody"]["content"].values():
                schema = resolved(document, content["schema"])
                assert {*schema["properties"]} == {*route.body.__struct_fields__}
                assert content["example"] == {"name": "lamp"}


def test_its_limits_are_those_of_the_service(document: Any) -> None:
    """The bounds of numbers are in the document as the service has them."""
    given = {
        part["name"]: part["schema"]
        for part in document["components"]["parameters"].values()
        if part["in"] != "header"
    }
    ids = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    assert given["after"] == ids
    assert given["before"] == {**ids, "maximum": 2**31}
    assert given["id"] == {**ids, "minimum": 1}
    assert given["limit"] == {"type": "integer", "minimum": 1, "maximum": 1000}
    assert given["order"]["enum"] == ["oldest", "newest"]


ODD = st.sampled_from(" \t\n\x00\x7f\x85\xa0\u2003\u200b\u200d\u2800\u3164\ufeffaé\U0001f600")
TEXT = st.text(ODD, max_size=20) | st.text(max_size=20)


@given(TEXT)
def test_its_pattern_of_a_name_is_the_rule(document: Any, text: str) -> None:
    """A name matches the pattern in the document just if the service accepts it."""
    pattern = document["components"]["schemas"]["Name"]["pattern"]
    try:
        clean_name(text)
    except InvalidField:
        assert not re.search(pattern, text)
    else:
        assert re.search(pattern, text)


@given(TEXT)
def test_its_pattern_of_a_search_is_the_rule(document: Any, text: str) -> None:
    """The beginning of a name matches the pattern just if the service searches for it."""
    pattern = document["components"]["parameters"]["Name"]["schema"]["pattern"]
    try:
        Filter(name=text)
    except InvalidField:
        assert not re.search(pattern, text)
    else:
        assert re.search(pattern, text)


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        ("/", "GET", "200 400 406 422 500 503"),
        ("/", "POST", "200 400 403 406 409 413 415 422 500 503"),
        ("/count", "GET", "200 400 406 422 500 503"),
        ("/{id}", "GET", "200 304 404 406 412 500 503"),
        ("/{id}", "PUT", "200 400 403 404 406 409 412 413 415 422 500 503"),
        ("/{id}", "PATCH", "200 400 403 404 406 409 412 413 415 422 500 503"),
        ("/{id}", "DELETE", "204 403 404 406 409 412 500 503"),
        ("/livez", "GET", "200 406 500"),
        ("/readyz", "GET", "200 406 500 503"),
        ("/healthz", "GET", "200 406 500 503"),
    ],
)
def test_an_operation_has_these_responses(
    path: str, method: str, statuses: str, document: Any
) -> None:
    """Each status that an operation can have is described, and no other."""
    described = document["paths"][path][method.lower()]["responses"]
    assert " ".join(described) == statuses


@pytest.mark.parametrize(
    ("path", "method", "status", "headers"),
    [
        ("/", "get", "200", {"Link"}),
        ("/", "post", "200", {"Location", "Idempotent-Replayed"}),
        ("/{id}", "get", "200", {"ETag"}),
        ("/{id}", "patch", "200", {"ETag", "Idempotent-Replayed"}),
        ("/", "post", "503", {"Retry-After", "Commit-Outcome"}),
    ],
)
def test_a_response_has_these_headers(
    path: str, method: str, status: str, headers: set[str], document: Any
) -> None:
    """The headers that a client may act on are described where they come."""
    response = resolved(document, document["paths"][path][method]["responses"][status])
    assert set(response["headers"]) == headers


def test_every_failure_is_an_error(document: Any) -> None:
    """What a client gets instead of success is JSON with ``error``, and has an example."""
    for _, _, operation in operations(document):
        for status, reference in operation["responses"].items():
            if status >= "400":
                content = resolved(document, reference)["content"]["application/json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Error"}
                assert content["example"]["error"]


@pytest.mark.parametrize(("path", "method"), [("/", "post"), ("/{id}", "patch")])
def test_a_key_is_described(path: str, method: str, document: Any) -> None:
    """What can be done with an Idempotency-Key, and what may come of it, is in the document."""
    operation = document["paths"][path][method]
    parameters = [resolved(document, part)["name"] for part in operation["parameters"]]
    assert "Idempotency-Key" in parameters
    for status in ("400", "409", "413", "422"):
        response = resolved(document, operation["responses"][status])
        schema = response["content"]["application/problem+json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Problem"}


def test_the_service_is_as_described(sqlite_url: str, tmp_path: Path) -> None:
    """Requests that schemathesis makes up from the document find no fault in the service."""
    with serve("--database-url", sqlite_url) as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [sys.executable, "-W", "ignore", "-m", "schemathesis.cli"]
        command += ["--config-file", str(CONFIG), "run", url, "--checks", "all"]
        command += ["--max-examples", str(EXAMPLES), "--generation-deterministic"]
        hooks = {**os.environ, "PYTHONPATH": str(CONFIG.parent)}
        done = subprocess.run(
            command, cwd=tmp_path, env=hooks, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout
    assert "failed" not in server.log
