"""One gateway process from start to stop: event loop, port, signals, draining."""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from aiohttp import web

from common.telemetry import configure_logging
from gateway.app import create_app, open_default_services, running
from gateway.connection import Site
from gateway.file_watch import watch
from gateway.services import SERVICES
from gateway.settings import GatewaySettings
from gateway.tls import certificate_of

logger = logging.getLogger(__name__)

_CLOSING_S = 2.0  # for handlers to end once their streams were stopped


def run_server(settings: GatewaySettings, metrics_folder: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the port cannot be had."""
    configure_logging(settings.log_level, settings.json_output)
    _raise_file_limit()
    gc.freeze()  # what was imported stays: a full collection need not walk through it
    gc.set_threshold(5_000, 20, 100)  # one read brings hundreds of frames: none is in a cycle
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, metrics_folder=metrics_folder))


async def serve(
    settings: GatewaySettings,
    *,
    metrics_folder: Path | None = None,
    stop: asyncio.Event | None = None,
    started: asyncio.Future[int] | None = None,
) -> None:
    """Serve until `stop`, or a signal; `started` receives the port."""
    stop = stop or _stop_on_signals()
    app = create_app(
        settings, open_services=partial(open_default_services, metrics_folder=metrics_folder)
    )
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves cancels its handler, which cancels its request
        shutdown_timeout=settings.drain_s + _CLOSING_S,
    )
    await runner.setup()
    try:
        if settings.wait_for_model and not await _is_ready_before(app, stop):
            return
        async with _open_port(runner, settings, shares_port=metrics_folder is not None) as port:
            if started:
                started.set_result(port)
            await stop.wait()
        logger.info("stopping", extra={"open_requests": app[SERVICES].admission.num_open})
        app[SERVICES].is_draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(settings.drain_s, app[SERVICES].generator.stop_streams)
    finally:
        # closes the port and waits for open streams; those left after `drain_s` end behind a whole event
        await runner.cleanup()
    logger.info("stopped")


@asynccontextmanager
async def _open_port(
    runner: web.AppRunner, settings: GatewaySettings, *, shares_port: bool
) -> AsyncIterator[int]:
    """Listen, and give the port. The runner closes it; until the block ends, new certificates are noticed."""
    certificate = certificate_of(settings)
    site = Site(
        runner,
        settings.hostname,
        settings.port,
        read_timeout_s=settings.read_timeout_s,
        ssl_context=certificate.context if certificate else None,
        shares_port=shares_port,
    )
    await site.start()
    logger.info("listening", extra={"address": site.name})
    async with AsyncExitStack() as stack:
        if certificate:
            watching = partial(watch, certificate.files, certificate.reload)
            await stack.enter_async_context(running(watching, "tls-files"))
        yield site.port


async def _is_ready_before(app: web.Application, stop: asyncio.Event) -> bool:
    """Wait for a worker; False when the process was told to stop first."""
    ready = asyncio.create_task(app[SERVICES].directory.wait_until_ready())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in (ready, stopped):
        task.cancel()
    await asyncio.gather(ready, stopped, return_exceptions=True)
    return not stop.is_set()


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: a connection is one, and shells allow 1024 by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS says "no limit", and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:  # its end, however it came, is ours too
        asyncio.get_running_loop().add_reader(supervisor.sentinel, stop.set)
    return stop


def _loop_factory():
    """uvloop where there is one: a third less time for every event."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None
