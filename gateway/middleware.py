"""What happens around every handler: record and span, CORS, errors as JSON, and refusal while draining."""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, hdrs, web
from opentelemetry.trace import SpanKind, Status, StatusCode

from common.errors import FleetError, Overloaded, PayloadTooLarge, Unavailable
from common.telemetry import extract
from gateway.native_format import error_json
from gateway.openai_errors import (
    http_error_json,
    is_openai_path,
    openai_error_json,
    openai_status,
)
from gateway.record import RECORD, RequestRecord
from gateway.services import SERVICES

logger = logging.getLogger("gateway.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_QUIET_PATHS = frozenset(
    ("/health", "/health/live", "/health/ready", "/ready", "/ping", "/metrics")
)
_OUR_HEADERS = (
    "authorization, content-type, idempotency-key, last-event-id, traceparent, x-on-disconnect, "
    "x-model, x-request-id"
)
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?: *, *[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_LONGEST_HEADER_NAMES = 2000  # characters; OpenAI's JavaScript client asks for 12 headers in 250
_EXPOSED_HEADERS = (
    "retry-after, x-request-id, x-compute-type, x-compute-time, x-compute-characters, x-total-time, "
    "x-validation-time, x-queue-time, x-inference-time, x-time-per-token, x-prompt-tokens, x-generated-tokens"
)
_ERROR_TYPES = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    415: "unsupported_media_type",
}


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, a record and a server span; write one log line at its end."""
    record = request[RECORD] = RequestRecord(id=uuid.uuid4().hex)
    tracer = request.app[SERVICES].tracer
    context = extract(request.headers.get("traceparent", ""))
    status: int | str = "closed"  # by the client, before there was an answer
    with tracer.start_as_current_span(
        f"{request.method} {_route(request)}", context, kind=SpanKind.SERVER, record_exception=False
    ) as span:
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            span.set_attributes(
                {
                    "http.request.method": request.method,
                    "http.route": _route(request),
                    "http.response.status_code": status if isinstance(status, int) else 499,
                    "tokenfleet.request_id": record.id,
                    **{f"tokenfleet.{name}": value for name, value in record.fields().items()},
                }
            )
            if status == "closed" or status == 500:
                span.set_status(Status(StatusCode.ERROR))
            _log(request, record, status)


def _log(request: web.Request, record: RequestRecord, status: int | str) -> None:
    is_quiet = request.path in _QUIET_PATHS and status == 200
    logger.log(
        logging.DEBUG if is_quiet else logging.INFO,
        "%s %s %s",
        request.method,
        _route(request),
        status,
        extra={"request_id": record.id, "total_s": round(record.elapsed_s, 6), **record.fields()},
    )


def _route(request: web.Request) -> str:
    """The route's pattern; never an unknown path, which would be a client's free text in logs and traces."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "(unknown)"


@web.middleware
async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer preflight requests; `add_headers` does the rest.

    Any header may be sent: there is no cookie that a page of somebody else could use.
    """
    if (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    ):
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "DELETE, GET, HEAD, POST",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _allowed_headers(request),
            hdrs.ACCESS_CONTROL_MAX_AGE: "600",
            hdrs.VARY: hdrs.ACCESS_CONTROL_REQUEST_HEADERS,
        }
        return web.Response(status=204, headers=headers)
    return await handler(request)


def _allowed_headers(request: web.Request) -> str:
    """Ours, and those that the client asks for if it is a list of names: `*` would leave out `authorization`."""
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").strip()
    if len(asked) <= _LONGEST_HEADER_NAMES and _HEADER_NAMES.fullmatch(asked):
        return f"{_OUR_HEADERS}, {asked}"
    return _OUR_HEADERS


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The headers of every answer, streams included: the request's id, and CORS."""
    response.headers[hdrs.SERVER] = "tokenfleet"
    if (record := request.get(RECORD)) is not None:
        response.headers["x-request-id"] = record.id
    origin, allowed = (
        request.headers.get(hdrs.ORIGIN),
        request.app[SERVICES].settings.cors_allow_origin,
    )
    if allowed:
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    if origin is None:
        return
    if not allowed:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
    elif origin in allowed:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
    response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS


async def answer_expect(request: web.Request) -> None:
    """Ask for a body that its client holds back. Any other expectation is ignored, as RFC 9110 allows: aiohttp's own
    refusal is no JSON.
    """
    if request.headers[hdrs.EXPECT].lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes `{"error", "error_type"}`, under /v1 OpenAI's shape; one that we did not foresee is logged and becomes a 500."""
    try:
        return await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except FleetError as error:
        return error_response(request, error)
    except web.HTTPRequestEntityTooLarge:
        limit = request.app[SERVICES].settings.payload_limit
        text = f"The request body is longer than {limit} bytes, the limit of this server"
        return error_response(request, PayloadTooLarge(text))
    except web.HTTPException as error:
        return _http_error(request, error)
    except Exception:
        logger.exception("request failed", extra={"request_id": request[RECORD].id})
        return error_response(
            request, FleetError("Internal error; the server's log has the details")
        )


def error_response(request: web.Request, error: FleetError) -> web.Response:
    """The JSON answer to an error, with Retry-After where trying again makes sense."""
    request[RECORD].error_type = error.kind
    headers = {}
    if isinstance(error, Overloaded):
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
    elif error.is_retryable:
        headers[hdrs.RETRY_AFTER] = "1"
    if is_openai_path(request.path):
        status, text = openai_status(error), openai_error_json(error)
    else:
        status, text = error.http_status, error_json(error)
    response = web.Response(
        status=status,
        body=text.encode(errors="replace"),  # a header that is quoted need not be UTF-8
        content_type="application/json",
        charset="utf-8",
        headers=headers,
    )
    if status == 408:  # the rest of the request may still come
        response.force_close()
    return response


def _http_error(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if error.status < 400:
        raise error
    kind = _ERROR_TYPES.get(error.status, "http_error")
    request[RECORD].error_type = kind
    kept = (hdrs.ALLOW, hdrs.ACCEPT_ENCODING, hdrs.WWW_AUTHENTICATE)
    headers = {name: error.headers[name] for name in kept if name in error.headers}
    message = (
        error.text if error.text and not error.text.startswith(str(error.status)) else error.reason
    )
    if is_openai_path(request.path):
        text = http_error_json(error.status, message)
        return web.json_response(text=text, status=error.status, headers=headers)
    return web.json_response(
        {"error": message, "error_type": kind}, status=error.status, headers=headers
    )


@web.middleware
async def refuse_while_draining(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A stopping process takes no new work, also not on connections that are already open."""
    is_work = request.method == hdrs.METH_POST or request.path.endswith("/stream")
    if request.app[SERVICES].is_draining and is_work:
        response = error_response(request, Unavailable("This gateway is stopping; try again"))
        response.force_close()
        return response
    return await handler(request)
