"""The OpenAPI document, from the route table and the pydantic models. Knows nothing of the running server."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.routes import Route

_ERRORS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    404: "The model is not served here, or the request is not known",
    409: "The stream cannot be continued behind the event of `Last-Event-ID`",
    413: "The body is too long",
    415: "The body is not declared as JSON",
    422: "The request breaks a rule; the message states rule and value",
    424: "The generation failed",
    429: "Overloaded: too many requests wait. Retry-After says when to come back",
    503: "No broker or no worker can be reached now. Retry-After says when to come back",
}
_DESCRIPTION = (
    "Text generation with the HTTP contract of text-generation-inference (TGI). "
    'Streams are server-sent events; every error is `{"error", "error_type"}`, under /v1 OpenAI\'s.'
)
_PARTS = {"request_id": "Given by the header X-Request-Id.", "model": "One of GET /v1/models."}
_REFERENCE = "#/components/schemas/{model}"


def openapi_document(routes: Iterable[Route], *, version: str, has_key: bool) -> str:
    """The document as JSON."""
    shown = [route for route in routes if route.tag]
    paths: dict[str, dict[str, Any]] = {}
    for route in shown:
        paths.setdefault(route.shown_path, {})[route.method.lower()] = _operation(
            route, has_key=has_key
        )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenfleet",
            "version": version,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name} for name in dict.fromkeys(route.tag for route in shown)],
        "paths": paths,
        "components": {"schemas": _schemas(shown)},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return json.dumps(document, ensure_ascii=False)


def _operation(route: Route, *, has_key: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [route.tag],
        "summary": route.summary,
        "description": route.description,
        "operationId": route.handler.__name__ + ("" if route.method == "POST" else _suffix(route)),
        "responses": {"200": _answer(route)},
    }
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = {"required": True, "content": _json(_reference(route.body))}
    if route.needs_key and has_key:
        operation["security"] = [{"key": []}]
    for status in route.errors:
        if status == 401 and not has_key:
            continue
        error = {"description": _ERRORS[status], "content": _json(_reference(route.error))}
        operation["responses"][str(status)] = error
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    """Parts of the path, and the headers of clients that come back."""
    names = [part[1:-1] for part in route.shown_path.split("/") if part.startswith("{")]
    found = [_parameter(name, "path", _PARTS[name]) for name in names]
    if route.event:
        found.append(_parameter("Last-Event-ID", "header", "Go on behind this event."))
    if route.event and route.body:
        what = "Retries with the same key and body attach to the one generation."
        found.append(_parameter("Idempotency-Key", "header", what))
        what = "What becomes of the generation when nobody reads it: cancel, grace or run."
        found.append(_parameter("X-On-Disconnect", "header", what))
    return found


def _parameter(name: str, place: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string"},
    }


def _suffix(route: Route) -> str:
    """Two paths may share a handler, but an operation's id is unique."""
    return route.shown_path.translate(str.maketrans({"/": "_", ".": "_", "{": None, "}": None}))


def _answer(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer:
        schema = _reference(route.answer)
        content |= _json({"type": "array", "items": schema} if route.is_array else schema)
    if route.event:
        content["text/event-stream"] = {"schema": _reference(route.event)}
    return {"description": "OK", **({"content": content} if content else {})}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _schemas(routes: list[Route]) -> dict[str, Any]:
    asked = {route.body for route in routes if route.body}
    answered = {model for route in routes for model in (route.answer, route.event) if model}
    inputs = [(model, "validation") for model in sorted(asked, key=lambda model: model.__name__)]
    outputs = sorted(
        {*answered, *(route.error for route in routes)}, key=lambda model: model.__name__
    )
    both = [*inputs, *((model, "serialization") for model in outputs)]
    _, definitions = models_json_schema(both, ref_template=_REFERENCE)
    return definitions["$defs"]
