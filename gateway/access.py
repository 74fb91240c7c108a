"""Who asks: wraps the handlers of routes that need a key, and tells them whose request it is.

A request belongs to the key that it came with: another key can neither read nor cancel it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from aiohttp import hdrs, web

from common.errors import (
    GenerationFailed,
    IdempotencyConflict,
    Overloaded,
    RateLimited,
    RequestNotFound,
)
from common.messages import GenerationRequest, OnDisconnect
from common.token_journal import StreamDiverged
from gateway.admission import ANYBODY, Holder
from gateway.api_keys import ApiKey, KeyRing
from gateway.record import RECORD, RequestRecord
from gateway.services import SERVICES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_KEY = web.RequestKey("api-key", ApiKey)


def require_key(handler: Handler, *, keys: KeyRing, is_metered: bool) -> Handler:
    """Wrap a handler: without a valid key the answer is 401; `is_metered` requests count against the key's limits."""

    async def check(request: web.Request) -> web.StreamResponse:
        key = keys.find(_credentials(request))
        if key is None:
            raise web.HTTPUnauthorized(
                text="A valid key is needed: `Authorization: Bearer <key>`",
                headers={hdrs.WWW_AUTHENTICATE: "Bearer"},
            )
        request[_KEY], request[RECORD].key = key, key.name or None
        if not is_metered:
            return await handler(request)
        async with paying(request):
            return await handler(request)

    return check


@asynccontextmanager
async def paying(request: web.Request, *, is_reading: bool = False) -> AsyncIterator[None]:
    """Serve `request` within the limits of its key, which pays for it; a key without a name has none.

    Args:
        is_reading: it only goes on with what was let in before, and so counts not as another open request.

    Raises RateLimited, and Unavailable without a broker.
    """
    services, record, key = request.app[SERVICES], request[RECORD], request.get(_KEY)
    if key is None or not key.name:
        yield
        return
    limited = replace(key, max_concurrent_requests=None) if is_reading else key
    try:
        async with services.limits.held(limited, lambda: _cost(record)):
            try:
                yield
            except BaseException as error:
                record.is_left = _may_go_on_behind(error)
                raise
    except RateLimited:
        services.metrics.key_refusals.labels(key.name).inc()
        raise
    finally:
        if is_reading:
            services.metrics.key_tokens.labels(key.name, "generated").inc(record.new_tokens)
        else:
            counts = record.new_prompt_tokens, record.new_tokens
            services.metrics.observe_key(key.name, *counts)


def tenant_of(request: web.Request) -> str:
    """Whose request it is: the name of its key, or "" where nobody has a name."""
    key = request.get(_KEY)
    return key.name if key else ""


def holder_of(request: web.Request) -> Holder:
    """Who holds a place of this process for it."""
    key = request.get(_KEY)
    return Holder(key.name, key.weight) if key else ANYBODY


def with_owner(
    made: GenerationRequest, request: web.Request, *, asked_priority: int | None
) -> GenerationRequest:
    """`made` with its owner, in the class that this owner may have."""
    key = request.get(_KEY)
    if key is None:
        return made
    priority = made.priority
    if key.priority is not None:
        priority = key.priority if asked_priority is None else max(key.priority, asked_priority)
    return replace(made, tenant=key.name, priority=priority)


def require_own(known: GenerationRequest, request: web.Request) -> GenerationRequest:
    """A request that was found by its id. Raises RequestNotFound when another key made it."""
    if known.tenant != tenant_of(request):
        raise RequestNotFound()
    return known


def _credentials(request: web.Request) -> str:
    scheme, _, credentials = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def _may_go_on_behind(error: BaseException) -> bool:
    """Whether a generation may still run when its handler ends with `error`; not when it failed, or was not queued."""
    is_over = isinstance(error, Overloaded | IdempotencyConflict | GenerationFailed)
    return not is_over or isinstance(error, StreamDiverged)


def _cost(record: RequestRecord) -> int:
    """Tokens to pay for: of a prompt by who queued it, of an answer by who reads them, less those read before.

    A generation that shall run without its client is paid by who queued it, to its end: when that was not seen, as if
    it were as long as it may become. Who reads it later pays nothing.
    """
    if record.known is not None and record.known.on_disconnect is OnDisconnect.RUN:
        return 0
    num_tokens = record.new_prompt_tokens + record.new_tokens
    if record.is_left and record.known is None and record.on_disconnect is OnDisconnect.RUN:
        return max(num_tokens, record.new_prompt_tokens + (record.max_new_tokens or 0))
    return num_tokens
