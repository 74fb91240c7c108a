"""The application of one gateway process: routes, middleware, and what lives as long as it does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cache, partial
from pathlib import Path

from aiohttp import hdrs, web

from common.faults import open_request_queue
from common.lua import Scripts
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import RequestQueue
from common.request_store import RequestStore
from common.subscriber import Subscriber
from common.telemetry import configure_tracing
from common.token_journal import TokenJournal
from common.worker_registry import WorkerRegistry
from gateway.access import require_key
from gateway.admission import Admission
from gateway.api_keys import KeyRing
from gateway.broker_health import BrokerHealth
from gateway.exposition import SharedMetrics
from gateway.file_watch import watch
from gateway.generation import Generator
from gateway.handlers.docs import OPENAPI
from gateway.handlers.system import package_version
from gateway.key_limits import KeyLimits
from gateway.metrics import GatewayMetrics
from gateway.middleware import (
    add_headers,
    answer_expect,
    cors,
    errors,
    observe,
    refuse_while_draining,
)
from gateway.model_directory import ModelDirectory
from gateway.openapi import openapi_document
from gateway.request_finder import RequestFinder
from gateway.routes import Route, route_table
from gateway.services import SERVICES, Services
from gateway.settings import GatewaySettings
from gateway.tokenization import TokenizerCache
from gateway.watching import Watches

logger = logging.getLogger(__name__)

OpenServices = Callable[[GatewaySettings], AbstractAsyncContextManager[Services]]


def create_app(
    settings: GatewaySettings, *, open_services: OpenServices | None = None
) -> web.Application:
    """The application. `open_services` makes its collaborators when it starts; tests pass their own.

    Raises KeyFileError.
    """
    keys = KeyRing(settings.api_key, settings.api_keys_file)
    app = web.Application(
        middlewares=[observe, cors, errors, refuse_while_draining],
        client_max_size=settings.payload_limit,
    )
    routes = route_table()
    for route in routes:
        handler = _handler(route, keys)
        for method in _methods(route):
            app.router.add_route(method, route.path, handler, expect_handler=answer_expect)
    app[OPENAPI] = openapi_document(routes, version=package_version(), has_key=not keys.is_open)
    app.on_response_prepare.append(add_headers)

    async def services(app: web.Application) -> AsyncIterator[None]:
        async with (open_services or open_default_services)(settings) as opened:
            app[SERVICES] = opened
            yield

    async def watched_keys(app: web.Application) -> AsyncIterator[None]:
        watching = partial(watch, [keys.path] if keys.path else [], keys.reload)
        async with running(watching, "api-keys"):
            yield

    app.cleanup_ctx.append(services)
    app.cleanup_ctx.append(watched_keys)
    return app


def _methods(route: Route) -> tuple[str, ...]:
    """What can be got can be asked about by HEAD, which aiohttp answers without the body; not so a stream."""
    is_page = route.method == hdrs.METH_GET and route.event is None
    return (hdrs.METH_GET, hdrs.METH_HEAD) if is_page else (route.method,)


def _handler(route: Route, keys: KeyRing):
    if route.needs_key and not keys.is_open:
        return require_key(route.handler, keys=keys, is_metered=route.generates)
    return route.handler


@asynccontextmanager
async def open_default_services(
    settings: GatewaySettings, *, metrics_folder: Path | None = None
) -> AsyncIterator[Services]:
    """The collaborators of a process: one client and one pub/sub connection for all requests."""
    async with AsyncExitStack() as stack:
        redis = open_redis(settings.redis_url, max_connections=256)
        stack.push_async_callback(redis.aclose)
        subscriber = await stack.enter_async_context(Subscriber(settings.redis_url))
        scripts = Scripts(redis)

        @cache
        def open_queue(model: str) -> RequestQueue:
            return open_request_queue(
                redis, ModelKeys(model), scripts=scripts, fault_at=settings.fault_at
            )

        @cache
        def open_journal(model: str) -> TokenJournal:
            return TokenJournal(redis, ModelKeys(model), subscriber, scripts=scripts)

        @cache
        def open_store(model: str) -> RequestStore:
            return RequestStore(redis, ModelKeys(model), scripts=scripts)

        tokenizers = TokenizerCache(num_threads=settings.validation_workers)
        stack.callback(tokenizers.close)
        metrics = GatewayMetrics()
        watches = Watches(open_store)
        generator = Generator(
            open_queue=open_queue,
            open_journal=open_journal,
            open_store=open_store,
            watches=watches,
            metrics=metrics,
            max_waiting=settings.max_waiting_requests,
        )
        stack.push_async_callback(generator.close)
        directory = ModelDirectory(
            WorkerRegistry(redis), tokenizers, open_queue, default_model=settings.model_id
        )
        await directory.refresh()
        shared_metrics = SharedMetrics(metrics.registry, folder=metrics_folder)
        limits = KeyLimits(scripts)
        stack.push_async_callback(limits.close)
        broker = BrokerHealth(redis)
        await broker.refresh()
        await stack.enter_async_context(running(directory.run, "model-directory"))
        await stack.enter_async_context(running(broker.run, "broker-health"))
        await stack.enter_async_context(running(watches.run, "watches"))
        await stack.enter_async_context(running(shared_metrics.run, "metrics-file"))
        await stack.enter_async_context(running(limits.run, "key-limits"))
        yield Services(
            settings=settings,
            directory=directory,
            generator=generator,
            finder=RequestFinder(directory, open_store),
            broker=broker,
            admission=Admission(max_requests=settings.max_concurrent_requests),
            metrics=metrics,
            shared_metrics=shared_metrics,
            limits=limits,
            tracer=configure_tracing(settings.otlp_endpoint, settings.otlp_service_name),
        )


@asynccontextmanager
async def running(work: Callable, name: str) -> AsyncIterator[None]:
    """Run a background task for as long as the block; the process ends when the task dies."""
    task = asyncio.create_task(work(), name=name)
    task.add_done_callback(_stop_if_dead)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _stop_if_dead(task: asyncio.Task) -> None:
    if task.cancelled() or task.exception() is None:
        return
    logger.critical("background task %s died", task.get_name(), exc_info=task.exception())
    asyncio.get_running_loop().call_soon(_exit)


def _exit() -> None:
    raise SystemExit(1)
