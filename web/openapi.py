"""The OpenAPI document of a router, made from its routes and the structs in their signatures.

https://spec.openapis.org/oas/v3.1.1
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from web.errors import Failure
from web.router import JSON, JSON_HEADERS, SAFE_METHODS, Error, JSONRequest, Response, etag_of

if TYPE_CHECKING:
    from web.router import Resource, Route, Router

TEXT = {"type": "string"}
REF = "#/components/schemas/{name}"

CONDITIONS = {
    "If-Match": "Only if what is there has one of these entity tags.",
    "If-None-Match": "Only if what is there has none of these entity tags.",
}

REFUSALS = {
    304: "The client has it already.",
    308: "It is here, with a slash at its end.",
    400: "What was sent cannot be read.",
    403: "A page of another site asked for it.",
    404: "There is no such item.",
    406: "The client accepts none of the media types that there are.",
    409: "It is in conflict with what is stored.",
    412: "What is there is not, or no longer, what the condition says.",
    413: "The body is too long.",
    415: "The body is not plain JSON.",
    422: "What was sent is not what was asked for.",
    500: "Something failed; the log knows more under the id.",
    503: "The database is not available, or it is not known what became of the work.",
}
"""Why a request may have no success, by status."""

HEADERS = {
    308: {"Location": "Where it is."},
    503: {
        "Retry-After": "Seconds after which it may be tried again.",
        "Commit-Outcome": "`unknown` where the work may have been done: don't repeat it blindly.",
    },
}


class Documentation:
    """The resource that describes the router.

    :param router: what is described, with all that it has when the document is first asked for.
    """

    def __init__(self, router: Router) -> None:
        self.router = router

    def show(self, request: JSONRequest) -> Response:
        """Describe this service."""
        servers = [{"url": request.environ.get("SCRIPT_NAME") or "/"}]
        body = msgspec.json.encode({**self.document, "servers": servers})
        headers = {"Content-Length": str(len(body)), "ETag": etag_of(body)}
        return Response(200, {**JSON_HEADERS, **headers}, [body])

    @cached_property
    def document(self) -> dict[str, Any]:
        return document(self.router)


def document(router: Router) -> dict[str, Any]:
    """Make the document of *router*, but for its servers."""
    resources = router.resources
    kinds = {kind for resource in resources.values() for kind in structs_in(resource)}
    structs = sorted({Error, Failure, *kinds}, key=str)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Items",
            "version": "1.0.0",
            "description": "Named items: made, listed, renamed and deleted.",
        },
        "paths": {
            pattern: dict(operations(resource, router)) for pattern, resource in resources.items()
        },
        "components": {"schemas": msgspec.json.schema_components(structs, ref_template=REF)[1]},
    }


def structs_in(resource: Resource) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs that need a schema; a query's members are parameters instead."""
    for routes in resource.methods.values():
        for route in routes.values():
            if route.body is not None:
                yield route.body
            yield from returned(route)


def returned(route: Route) -> list[type[msgspec.Struct]]:
    """The struct among what a handler returns, in a list, or none."""
    kinds = get_args(route.returns) or (route.returns,)
    return [kind for kind in kinds if issubclass(kind, msgspec.Struct)]


def operations(resource: Resource, router: Router) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each method in lower case, as a path item wants it, with what it does."""
    for method, routes in resource.methods.items():
        described = operation(method, routes)
        links = links_from(preferred(routes), router)
        if links:
            described["responses"]["200"]["links"] = links
        yield method.lower(), described
        if method == "GET":
            yield "head", as_head(described)
    yield "options", options(resource)


def options(resource: Resource) -> dict[str, Any]:
    first = preferred(next(iter(resource.methods.values())))
    allow = {"Allow": header("Their names.")}
    described = {"204": {"description": "The methods that there are.", "headers": allow}}
    if resource.path:
        described["404"] = refusal(404)
    return {
        "operationId": f"{first.name}_options",
        "summary": "Tell which methods there are.",
        "parameters": path_parameters(resource.path),
        "responses": described,
    }


def operation(method: str, routes: dict[str, Route]) -> dict[str, Any]:
    """Describe one method, whose *routes* differ in their media type."""
    first = preferred(routes)
    parameters = path_parameters(first.path) + query_parameters(first)
    if is_conditional(routes):
        parameters += [parameter("header", name, TEXT, text) for name, text in CONDITIONS.items()]
    described = {
        "operationId": first.name,
        "summary": first.summary,
        "parameters": parameters,
        "responses": dict(responses(method, routes)),
    }
    if first.body is not None:
        described["requestBody"] = {
            "required": bool(schema_of(first.body)["required"]),
            "content": {JSON: {"schema": reference(first.body)}},
        }
    return described


def as_head(described: dict[str, Any]) -> dict[str, Any]:
    """Make the operation that is GET without a body."""
    bare = {
        status: {name: value for name, value in response.items() if name != "content"}
        for status, response in described["responses"].items()
    }
    return described | {"operationId": f"{described['operationId']}_head", "responses": bare}


def links_from(route: Route, router: Router) -> dict[str, Any]:
    """Describe the operations on what *route* returns: on paths that name members of it."""
    members = {name for struct in returned(route) for name in struct.__struct_fields__}
    return {
        target.name: {
            "operationId": target.name,
            "parameters": {name: f"$response.body#/{name}" for name in target.path},
        }
        for resource in router.numbered.values()
        for target in map(preferred, resource.methods.values())
        if members.issuperset(target.path)
    }


def preferred(routes: dict[str, Route]) -> Route:
    return next(iter(routes.values()))


def is_conditional(routes: dict[str, Route]) -> bool:
    return any(route.conditional for route in routes.values())


# Parameters.


def path_parameters(path: dict[str, Any]) -> list[dict[str, Any]]:
    return [parameter("path", name, msgspec.json.schema(kind)) for name, kind in path.items()]


def query_parameters(route: Route) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    properties = schema_of(route.query)["properties"]
    return [parameter("query", name, schema) for name, schema in properties.items()]


def parameter(
    place: str, name: str, schema: dict[str, Any], description: str | None = None
) -> dict[str, Any]:
    rest = {key: value for key, value in schema.items() if key != "description"}
    text = description or schema["description"]
    required = place == "path"
    return {"in": place, "name": name, "description": text, "required": required, "schema": rest}


# Responses.


def responses(method: str, routes: dict[str, Route]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each status with its response."""
    yield success(routes)
    for status in sorted(set(refusals(method, routes))):
        yield str(status), refusal(status)


def refusal(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {"description": REFUSALS[status]}
    if status in HEADERS:
        described["headers"] = {name: header(text) for name, text in HEADERS[status].items()}
    if status >= 400:
        schema = reference(Failure if status == 500 else Error)
        described["content"] = {JSON: {"schema": schema}}
    return described


def success(routes: dict[str, Route]) -> tuple[str, dict[str, Any]]:
    first = preferred(routes)
    if first.returns is type(None):
        return "204", {"description": "It is done."}
    described: dict[str, Any] = {
        "description": first.summary,
        "content": {media: {"schema": content(media, route)} for media, route in routes.items()},
    }
    texts = dict(first.headers)
    if any(route.tagged for route in routes.values()):
        texts["ETag"] = "The strong entity tag of what is sent."
    if texts:
        described["headers"] = {name: header(text) for name, text in texts.items()}
    return "200", described


def content(media_type: str, route: Route) -> dict[str, Any]:
    for struct in returned(route):
        return reference(struct)
    return {"type": "object" if media_type == JSON else "string"}


def refusals(method: str, routes: dict[str, Route]) -> Iterator[int]:
    """Yield each status that may come instead of success."""
    first = preferred(routes)
    safe = method in SAFE_METHODS
    yield from (406, 500, 503)
    if not safe:
        yield from (403, 409)
    if is_conditional(routes):
        yield from (304, 412) if safe else (412,)
    if first.path:
        yield 404
    if first.query is not None:
        yield from (400, 422)
    if first.body is not None:
        yield from (400, 413, 415, 422)
    if "text/html" in routes:
        yield 308


# Schemas.


def header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": TEXT}


def reference(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": REF.format(name=struct.__name__)}


def schema_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    schema: dict[str, Any] = msgspec.json.schema_components([struct])[1][struct.__name__]
    return schema
