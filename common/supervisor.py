"""Keeps programs running: starts them together, restarts those that crash, stops them in order.

A failure before everything is ready is final, because a bad model does not get better by loading it again; one after that
is a crash, and the program is started again. Knows neither gateway, worker nor broker.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Self

from common.child import Child, describe_exit
from common.errors import FleetError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STABLE_AFTER_S = 60.0  # a program that ran this long starts again with the first pause
READY_POLL_S = 0.1

log = logging.getLogger(__name__)


class StartupFailed(FleetError):
    """A program ended before it was ready."""

    kind = "startup"

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} could not start ({describe_exit(code)}); its message is above")
        self.exit_code = code if code > 0 else 1


class Service:
    """A program that is kept running. `start` makes one process of it; `keep_running` makes the next ones."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Child],
        *,
        grace_s: float,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """Nothing runs yet.

        Args:
            name: for log lines.
            start: starts one process.
            grace_s: time between SIGTERM and SIGKILL when it is stopped.
            first_pause_s: before the first restart; it doubles with each crash, up to `LONGEST_PAUSE_S`.
        """
        self.name = name
        self._start, self._grace_s, self._first_pause_s = start, grace_s, first_pause_s
        self._child: Child | None = None
        self._started_at = 0.0

    @property
    def pid(self) -> int:
        """Of the last process that was started."""
        assert self._child is not None, f"{self.name} was never started"
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """Of the last process that was started; None while it runs."""
        return self._child.exit_code if self._child else None

    def start(self) -> None:
        """Start a process."""
        self._child = self._start()
        self._started_at = time.monotonic()
        log.debug("%s started as process %d", self.name, self._child.pid)

    async def keep_running(self) -> None:
        """Start it again whenever it ends, until this coroutine is cancelled."""
        pause_s = self._first_pause_s
        while True:
            assert self._child is not None, f"{self.name} was never started"
            code = await self._child.exited()
            lived_s = time.monotonic() - self._started_at
            if lived_s > STABLE_AFTER_S:
                pause_s = self._first_pause_s
            log.warning(
                "%s ended after %.1f s (%s); it starts again in %.1f s",
                self.name, lived_s, describe_exit(code), pause_s,
            )  # fmt: skip
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.start()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when it has not ended within its grace. Does nothing when it does not run."""
        if self._child is None or self._child.exit_code is not None:
            return
        self._child.terminate()
        try:
            async with asyncio.timeout(self._grace_s):
                await self._child.exited()
        except TimeoutError:
            log.warning("%s did not end within %.1f s and is killed", self.name, self._grace_s)
            self._child.kill()
            await self._child.exited()

    def kill(self) -> None:
        """End it at once."""
        if self._child:
            self._child.kill()


class Supervisor:
    """Runs services from `async with` on; leaving the block stops them.

    `groups` are in the order in which they are stopped: the members of one together, then the next. Services are
    started in the reverse order.
    """

    def __init__(self, groups: Sequence[Sequence[Service]]) -> None:
        self._groups = groups
        self._services = [service for group in groups for service in group]
        self._stop = asyncio.Event()
        self.was_killed = False

    async def __aenter__(self) -> Self:
        try:
            for service in reversed(self._services):
                service.start()
        except BaseException:
            await self._stop_all()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop_all()

    def request_stop(self) -> None:
        """Asked once, services drain; asked twice, they are killed. Safe as a signal handler of the event loop."""
        if self._stop.is_set():
            self.was_killed = True
            for service in self._services:
                service.kill()
        self._stop.set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    async def until_ready(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Wait until `is_ready` says so, or a stop is requested. Raises StartupFailed when a service ends before."""
        while not self._stop.is_set():
            for service in self._services:
                if (code := service.exit_code) is not None:
                    raise StartupFailed(service.name, code)
            if await is_ready():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(READY_POLL_S):
                    await self._stop.wait()

    async def until_stop_requested(self) -> None:
        """Keep every service running until a stop is requested."""
        async with asyncio.TaskGroup() as tasks:
            kept = [
                tasks.create_task(service.keep_running(), name=f"keep {service.name}")
                for service in self._services
            ]
            await self._stop.wait()
            for task in kept:
                task.cancel()

    async def _stop_all(self) -> None:
        for group in self._groups:
            await asyncio.gather(*(service.stop() for service in group))
