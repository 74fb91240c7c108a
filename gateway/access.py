"""Who asks: wraps the handlers of routes that need a key, and tells them whose request it is.

A request belongs to the key that it came with: another key can neither read nor cancel it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from aiohttp import hdrs, web

from common.errors import RateLimited, RequestNotFound
from common.messages import GenerationRequest, OnDisconnect
from gateway.admission import ANYBODY, Holder
from gateway.api_keys import ApiKey, KeyRing
from gateway.record import RECORD, RequestRecord
from gateway.resumption import last_event_of
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
        if not (is_metered and key.name):
            return await handler(request)
        return await _metered(request, handler, key)

    return check


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


async def _metered(request: web.Request, handler: Handler, key: ApiKey) -> web.StreamResponse:
    services, record = request.app[SERVICES], request[RECORD]
    last_event = last_event_of(request)
    num_seen = last_event.index + 1 if last_event else None
    try:
        async with services.limits.held(key, lambda: _cost(record, num_seen)):
            try:
                return await handler(request)
            except (asyncio.CancelledError, ConnectionError):
                record.is_left = True
                raise
    except RateLimited:
        services.metrics.key_refusals.labels(key.name).inc()
        raise
    finally:
        services.metrics.observe_key(key.name, record.prompt_tokens, record.generated_tokens)


def _cost(record: RequestRecord, num_seen: int | None) -> int:
    """Tokens to pay for: prompt and answer, or of a stream that goes on what the client had not seen.

    A generation that runs on without its client is paid for as if it were as long as it may become.
    """
    generated = record.generated_tokens or 0
    if record.is_left and record.on_disconnect is OnDisconnect.RUN:
        generated = max(generated, record.max_new_tokens or 0)
    if num_seen is not None:
        return max(0, generated - num_seen)
    return (record.prompt_tokens or 0) + generated
