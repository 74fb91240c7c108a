"""An event loop on which no time passes, and whose network is a simulation: one seed, one history.

When nothing is ready, the clock jumps to the next timer. What is ready in one turn runs in an order drawn from the seed.
It opens no sockets: `create_unix_connection` goes to the simulated network, and `run_in_executor` runs the function in
place after a drawn time. Signal handlers belong to the simulated process that asks for them.
"""

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Process = contextvars.ContextVar[Any]
PROCESS: Process = contextvars.ContextVar("process")  # the simulated process that code runs in


class Deadlock(AssertionError):
    """Everybody waits, and there is no timer that could wake anybody."""


class Network(Protocol):
    """What `create_unix_connection` needs."""

    async def connect(self, protocol: asyncio.Protocol) -> asyncio.Transport: ...


class VirtualLoop(asyncio.BaseEventLoop):
    """Deterministic but for what is asked of it from outside."""

    def __init__(self, draw: random.Random, *, start: float = 1.7e9) -> None:
        super().__init__()
        self._now = start
        self._clock_resolution = 1e-6  # more than floats of this size round off
        self._draw = draw
        self._selector = self
        self.network: Network | None = None
        self.errors: list[dict] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list:
        """Called once a turn: let time pass."""
        if timeout is None:
            raise Deadlock("nothing is ready, and no timer is set")
        self._now += max(0.0, timeout)
        return []

    def _process_events(self, events: list) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def _run_once(self) -> None:
        if len(self._ready) > 1:
            mixed = list(self._ready)
            self._draw.shuffle(mixed)
            self._ready = deque(mixed)
        super()._run_once()

    async def create_unix_connection(
        self, protocol_factory: Callable[[], asyncio.Protocol], path: str | None = None, **_: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        assert self.network is not None
        protocol = protocol_factory()
        return await self.network.connect(protocol), protocol

    def run_in_executor(self, executor: Any, func: Callable, *args: Any) -> asyncio.Task:
        """The function runs in one piece, after the time that the current process needs for it."""

        async def work() -> Any:
            await PROCESS.get().compute()
            return func(*args)

        return self.create_task(work())

    def add_signal_handler(self, sig: int, callback: Callable, *args: Any) -> None:
        PROCESS.get().handlers[sig] = lambda: callback(*args)
