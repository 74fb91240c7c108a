"""The request's JSON as a pydantic model. What is wrong with it, body_errors.py says."""

import asyncio
from typing import TypeVar

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel
from pydantic import ValidationError as BodyError

from common.errors import MalformedRequest, RequestTimedOut
from gateway.compression import ENCODINGS, inflate
from gateway.handlers.body_errors import NOT_JSON, error_of
from gateway.services import SERVICES

Body = TypeVar("Body", bound=BaseModel)


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
        raise error_of(error, data) from None


async def read_data(request: web.Request) -> bytes:
    """The body, inflated if it is compressed.

    Raises MalformedRequest, RequestTimedOut, HTTPUnsupportedMediaType and HTTPRequestEntityTooLarge.
    """
    encoding = _encoding_of(request)
    settings = request.app[SERVICES].settings
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            data = await request.read()
    except TimeoutError as error:
        text = f"The body did not arrive within {settings.read_timeout_s:g} s"
        raise RequestTimedOut(text) from error
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise MalformedRequest(f"{NOT_JSON}the body is broken: {error}") from error
    return await _inflated(data, encoding, limit=settings.payload_limit) if encoding else data


def _encoding_of(request: web.Request) -> str:
    """How the body is compressed; "" when it is not. Raises HTTPUnsupportedMediaType."""
    given = request.headers.get(hdrs.CONTENT_ENCODING, "")
    encoding = given.strip().lower().removeprefix("x-")
    if encoding in ("", "identity"):
        return ""
    if encoding not in ENCODINGS:
        raise web.HTTPUnsupportedMediaType(
            text=f"`Content-Encoding` must be {' or '.join(ENCODINGS)}. Given: {given[:100]}",
            headers={hdrs.ACCEPT_ENCODING: ", ".join(ENCODINGS)},
        )
    return encoding


async def _inflated(data: bytes, encoding: str, *, limit: int) -> bytes:
    try:
        text = await asyncio.to_thread(inflate, data, encoding, limit=limit)
    except ValueError as error:
        raise MalformedRequest(f"{NOT_JSON}the body is broken: {error}") from error
    if len(text) > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(text))
    return text
