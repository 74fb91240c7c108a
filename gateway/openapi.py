"""The OpenAPI document, from the route table and the pydantic models. Knows nothing of the running server."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from common.messages import OnDisconnect
from gateway.resumption import EVENT_ID, LONGEST_KEY
from gateway.routes import Route
from gateway.schemas.native_answers import StreamEvent

_ERRORS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    404: "The model is not served here, or the request is not known",
    408: "The body did not arrive in time",
    409: "The stream cannot be continued behind the event of `Last-Event-ID`",
    413: "The body is too long",
    415: "The body is not declared as JSON, or compressed in a way that is not known here",
    422: "The request breaks a rule; the message states rule and value",
    424: "The generation failed",
    429: "Overloaded, or the key has used what it may. Retry-After says when to come back",
    503: "No broker or no worker can be reached now. Retry-After says when to come back",
}
_DESCRIPTION = (
    "Text generation with the HTTP contract of text-generation-inference (TGI). "
    'Streams are server-sent events; every error is `{"error", "error_type"}`, under /v1 OpenAI\'s.'
)
_PARTS = {"request_id": "Given by the header X-Request-Id.", "model": "One of GET /v1/models."}
_REFERENCE = "#/components/schemas/{model}"
_REQUEST_ID = "x-request-id"
_LINKS = {
    name: {
        "operationId": f"{name}_requests_request_id",
        "parameters": {"request_id": f"$response.header.{_REQUEST_ID}"},
    }
    for name in ("status", "cancel")
}


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
    if route.no_content:
        operation["responses"]["204"] = {"description": route.no_content}
    for status in route.errors:
        if status == 401 and not has_key:
            continue
        error = {"description": _ERRORS[status], "content": _json(_reference(route.error))}
        operation["responses"][str(status)] = error
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    """Parts of the path, the model, and the headers of clients that come back."""
    names = [part[1:-1] for part in route.shown_path.split("/") if part.startswith("{")]
    found = [_parameter(name, "path", _PARTS[name]) for name in names]
    if route.event:
        what, pattern = "Go on behind this event; empty: from the first.", f"^({EVENT_ID})?$"
        found.append(_parameter("Last-Event-ID", "header", what, pattern=pattern))
    if route.body:
        what = "The model, as `model` in the body; needed by neither where one is served."
        found.append(_parameter("X-Model", "header", what))
    if route.event and route.body:
        what = "Retries with the same key and body attach to the one generation."
        found.append(
            _parameter("Idempotency-Key", "header", what, minLength=1, maxLength=LONGEST_KEY)
        )
        what = "What becomes of the generation when nobody reads it."
        policies = [policy.value for policy in OnDisconnect]
        found.append(_parameter("X-On-Disconnect", "header", what, enum=policies))
    return found


def _parameter(name: str, place: str, description: str, **rules: Any) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string", **rules},
    }


def _suffix(route: Route) -> str:
    """Two paths may share a handler, but an operation's id is unique."""
    return route.shown_path.translate(str.maketrans({"/": "_", ".": "_", "{": None, "}": None}))


def _answer(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {route.media: {"schema": {"type": "string"}}} if route.media else {}
    if route.answer:
        schema = _reference(route.answer)
        content |= _json({"type": "array", "items": schema} if route.is_array else schema)
    if route.event:
        content["text/event-stream"] = {"schema": _event(route)}
    answer: dict[str, Any] = {"description": "OK"}
    if content:
        answer["content"] = content
    if route.generates:
        answer["headers"] = {_REQUEST_ID: {"schema": {"type": "string"}}}
        answer["links"] = _LINKS
    return answer


def _event(route: Route) -> dict[str, Any]:
    """A server-sent event, whose data is JSON in a string; OpenAI's streams end with one that is not."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(route.event), _reference(route.error)]},
    }
    ends_with_done = route.event is not StreamEvent
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "What `Last-Event-ID` takes."},
            "data": {"anyOf": [{"const": "[DONE]"}, data]} if ends_with_done else data,
        },
        "required": ["data"],
    }


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
