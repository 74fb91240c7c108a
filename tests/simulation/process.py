"""A process of a simulated fleet: the tasks that belong to it, and whether it runs."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from tests.simulation.virtual_loop import PROCESS


class SimProcess:
    """Told to stop or to die by the world, like a process by signals."""

    def __init__(self, name: str, step_s: Callable[[], float]) -> None:
        self.name = name
        self.handlers: dict[int, Callable[[], None]] = {}
        self.tasks: list[asyncio.Task] = []
        self.stopped_until = 0.0
        self.is_dead = False
        self._step_s = step_s
        self.closers: list[Callable[[], Coroutine]] = []

    async def turn(self) -> None:
        """Wait while the process is stopped; a dead one gets no further."""
        loop = asyncio.get_running_loop()
        while self.stopped_until > loop.time():
            await asyncio.sleep(self.stopped_until - loop.time())
        if self.is_dead:
            raise ConnectionRefusedError("this process is dead")

    async def compute(self) -> None:
        await asyncio.sleep(self._step_s())
        await self.turn()

    def start(self, work: Callable[[], Coroutine]) -> asyncio.Task:
        """Run `work` as this process' main task."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        return asyncio.get_running_loop().create_task(work(), name=self.name, context=context)


def adopt(loop: asyncio.AbstractEventLoop, coroutine: Any, context: Any = None) -> asyncio.Task:
    """Make a task that its process knows of."""
    process = context.get(PROCESS) if context is not None else PROCESS.get(None)
    task = asyncio.Task(coroutine, loop=loop, context=context)
    if process is not None:
        process.tasks.append(task)
        task.add_done_callback(process.tasks.remove)
    return task
