"""The request's JSON as a pydantic model, or the error that says what is wrong with it."""

import asyncio
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel
from pydantic import ValidationError as BodyError

from common.errors import MalformedRequest, RequestTimedOut, ValidationError
from gateway.services import SERVICES

Body = TypeVar("Body", bound=BaseModel)

_NOT_JSON = "Failed to parse the request body as JSON: "
_WRONG_TYPE = "Failed to deserialize the JSON body into the target type: "


async def read_body(request: web.Request, cls: type[Body]) -> Body:
    """The request's body.

    Raises MalformedRequest (400), RequestTimedOut (408), ValidationError (422), HTTPUnsupportedMediaType and
    HTTPRequestEntityTooLarge.
    """
    kind = request.content_type
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise web.HTTPUnsupportedMediaType(
            text="Expected request with `Content-Type: application/json`"
        )
    data = await read_data(request)
    try:
        return cls.model_validate_json(data)
    except BodyError as error:
        raise _in_words(error.errors(include_url=False, include_input=False)[0]) from None


async def read_data(request: web.Request) -> bytes:
    """The body as it came. Raises MalformedRequest, RequestTimedOut and HTTPRequestEntityTooLarge."""
    limit_s = request.app[SERVICES].settings.read_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await request.read()
    except TimeoutError as error:
        raise RequestTimedOut(f"The body did not arrive within {limit_s:g} s") from error
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise MalformedRequest(f"{_NOT_JSON}the body is broken: {error}") from error


def _in_words(problem: dict[str, Any]) -> Exception:
    """The first problem as one line; what the client sent is not repeated."""
    if problem["type"] == "json_invalid":
        reason = problem["ctx"]["error"] if "ctx" in problem else problem["msg"]
        return MalformedRequest(f"{_NOT_JSON}{reason}")
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return ValidationError(f"Unrecognized request argument supplied: {place}", param=place)
    text = f"{_WRONG_TYPE}{place + ': ' if place else ''}{problem['msg']}"
    return ValidationError(text, param=place or None)
