"""The document at ``/openapi.json``: valid, complete, and true."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import item_service
import pytest
from item_service import Service
from openapi_spec_validator import validate
from processes import serve
from sqlalchemy.orm import scoped_session, sessionmaker
from support import environ, serve_once

from resources import make_app
from web.router import Router

service = item_service.service

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = 20
"""Requests that are made up for each operation."""


@pytest.fixture
def router() -> Router:
    return make_app(scoped_session(sessionmaker()))


@pytest.fixture
def document(router: Router) -> Any:
    return json.loads(serve_once(router, environ("GET", "/openapi.json")).content)


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield path, method and operation of all that is described."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def test_it_is_valid(document: Any) -> None:
    """It is an OpenAPI 3.1 document by the field's own validator."""
    validate(document)
    assert document["openapi"].startswith("3.1.")


@pytest.mark.parametrize("prefix", ["", "/shop"])
def test_its_server_is_where_it_is(prefix: str, router: Router) -> None:
    """The server is the root of the service, below its prefix if it has one."""
    reply = serve_once(router, environ("GET", "/openapi.json", SCRIPT_NAME=prefix))
    assert json.loads(reply.content)["servers"] == [{"url": prefix or "/"}]


def test_it_has_every_method_of_every_path(service: Service, document: Any) -> None:
    """The methods that a path is said to have are those that OPTIONS tells, and no others."""
    for path, item in document["paths"].items():
        answer = service.client.options(path.replace("{id}", "1"), status=204)
        assert sorted(map(str.upper, item)) == answer.headers["Allow"].split(", ")


def test_each_operation_has_a_name_of_its_own(document: Any) -> None:
    """No two operations have the same id, and each says what it does."""
    described = [operation for _, _, operation in operations(document)]
    assert len({operation["operationId"] for operation in described}) == len(described)
    assert all(operation["summary"].endswith(".") for operation in described)


def test_the_schemas_are_those_of_the_service(document: Any) -> None:
    """The rules for a name, an id and a page are in the document as the service has them."""
    schemas = document["components"]["schemas"]
    name = {"type": "string", "minLength": 1, "maxLength": 16, "pattern": r"^[^\x00]*$"}
    assert schemas["NewItem"]["properties"] == {"name": name}
    assert schemas["ItemState"]["required"] == ["name"]
    given = {
        parameter["name"]: parameter["schema"]
        for path in ("/", "/{id}")
        for parameter in document["paths"][path]["get"]["parameters"]
    }
    assert given == {
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
        "after": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "id": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
        "If-Match": {"type": "string"},
        "If-None-Match": {"type": "string"},
    }


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        ("/", "GET", "200 304 308 400 406 412 422 500 503"),
        ("/", "POST", "200 400 403 406 409 413 415 422 500 503"),
        ("/", "OPTIONS", "204"),
        ("/{id}", "GET", "200 304 404 406 412 500 503"),
        ("/{id}", "HEAD", "200 304 404 406 412 500 503"),
        ("/{id}", "PUT", "200 400 403 404 406 409 412 413 415 422 500 503"),
        ("/{id}", "PATCH", "200 400 403 404 406 409 412 413 415 422 500 503"),
        ("/{id}", "DELETE", "204 403 404 406 409 412 500 503"),
        ("/{id}", "OPTIONS", "204 404"),
        ("/healthz", "GET", "200 406 500 503"),
        ("/openapi.json", "GET", "200 304 406 412 500 503"),
    ],
)
def test_an_operation_has_these_answers(
    path: str, method: str, statuses: str, document: Any
) -> None:
    """Each status that an operation can have is described, and no other."""
    described = document["paths"][path][method.lower()]["responses"]
    assert " ".join(described) == statuses


@pytest.mark.parametrize(
    ("path", "method", "status", "headers"),
    [
        ("/", "get", "200", {"Link", "ETag"}),
        ("/{id}", "get", "200", {"ETag"}),
        ("/{id}", "patch", "200", {"ETag"}),
        ("/{id}", "options", "204", {"Allow"}),
        ("/", "post", "503", {"Retry-After", "Commit-Outcome"}),
    ],
)
def test_an_answer_has_these_headers(
    path: str, method: str, status: str, headers: set[str], document: Any
) -> None:
    """The headers that a client may act on are described where they come."""
    response = document["paths"][path][method]["responses"][status]
    assert set(response["headers"]) == headers


def test_every_failure_is_an_error(document: Any) -> None:
    """What a client gets instead of success is JSON with ``error``, and with an id for a 500."""
    for _, method, operation in operations(document):
        for status, response in operation["responses"].items():
            if status < "400" or method in ("HEAD", "OPTIONS"):
                continue
            schema = {"$ref": f"#/components/schemas/{'Failure' if status == '500' else 'Error'}"}
            assert response["content"] == {"application/json": {"schema": schema}}


def test_the_service_is_as_described(sqlite_url: str, tmp_path: Path) -> None:
    """Requests that schemathesis makes up from the document find no fault in the service."""
    with serve("--database-url", sqlite_url, "--log-level", "info") as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [sys.executable, "-W", "ignore", "-m", "schemathesis.cli"]
        command += ["--config-file", str(CONFIG), "run", url, "--checks", "all"]
        command += ["--max-examples", str(EXAMPLES), "--generation-deterministic"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "failed" not in server.log
