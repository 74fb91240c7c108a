"""A fleet to break: gateways and workers as processes, a broker of its own, and a proxy between them."""

import asyncio
import random
import signal
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.redis_keys import GROUP, ModelKeys
from tests.chaos.client import Observation
from tests.chaos.proxy import FaultProxy
from tests.chaos.servers import ChaosBroker
from tests.fleet import Fleet, Process

LEASE_S = 1.5


class Arena:
    """Use as `async with Arena(...) as arena`. `sabotage` names what `tests.chaos.child` breaks in every process."""

    def __init__(
        self,
        draw: random.Random,
        *,
        num_gateways: int = 2,
        num_workers: int = 2,
        step_ms: float = 25,
        model: str = "echo",
        worker_options: Sequence[str] = (),
        sabotage: str = "poison",
        lease_s: float = LEASE_S,
    ) -> None:
        self.draw = draw
        self.urls: list[str] = []
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.salts: list[
            str
        ] = []  # of all workers that may have told something since `forget_salts`
        self.keys = ModelKeys(Path(model).name)
        self.broker: ChaosBroker
        self.proxy: FaultProxy
        # processes that ended though nobody told them to, with their log's end
        self.ended: list[str] = []
        self.twins: list[
            asyncio.Task[Observation]
        ] = []  # more readers of the stream that is looked at
        self.findings: list[str] = []  # what a fault saw that must not be
        self.are_deaths_expected = False
        self._fleet: Fleet
        self._num = (num_gateways, num_workers)
        self._options = (*worker_options, "--lease-s", str(lease_s))
        self._step_ms = step_ms
        self._model = model
        self._sabotage = sabotage
        self._num_workers = 0
        self._salt_of: dict[int, str] = {}  # by process id
        self._told: set[int] = set()  # pids of those that were told to end
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        self.broker = ChaosBroker(Path(folder))
        await self.broker.start()
        self._stack.push_async_callback(self.broker.close)
        self.proxy = await self._stack.enter_async_context(FaultProxy(self.broker.port))
        self._fleet = Fleet(self.proxy.url, program=("tests.chaos.child", self._sabotage))
        self._stack.push_async_callback(self._stop)
        num_gateways, num_workers = self._num
        await asyncio.gather(*(self.start_worker() for _ in range(num_workers)))
        await asyncio.gather(*(self.start_gateway() for _ in range(num_gateways)))

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def redis(self) -> Redis:
        """Goes to the broker directly, past the proxy."""
        return self.broker.redis

    async def start_worker(self, *options: str) -> Process:
        salt = f"salt-{self._num_workers}"
        self._num_workers += 1
        echo = ("--echo-salt", salt, "--echo-delay-ms", str(self._step_ms))
        self.salts.append(salt)
        process = await self._fleet.worker(*echo, *self._options, *options, model=self._model)
        self._salt_of[process.process.pid] = salt
        self.workers.append(process)
        return process

    def forget_salts(self) -> None:
        """Only workers that live now may tell something from here on."""
        self.salts[:] = [self._salt_of[process.process.pid] for process in self.workers]

    async def start_gateway(self, *options: str) -> Process:
        known = {id(process) for process in self._fleet.processes}
        try:
            url = await self._fleet.gateway("--keep-alive-s", "2", *options)
        except TimeoutError:
            said = [process.lines[-15:] for process in (*self._fleet.processes[-1:], *self.workers)]
            raise AssertionError(f"a gateway does not get ready: {said}") from None
        port = url.rpartition(":")[2]
        [process] = [
            process
            for process in self._fleet.processes
            if id(process) not in known and any(f":{port}" in line for line in process.lines)
        ]
        self.urls.append(url)
        self.gateways.append(process)
        return process

    async def end(self, process: Process, number: int = signal.SIGKILL) -> None:
        """Kill or drain, and wait until it is gone."""
        self._forget(process)
        try:
            await process.stop(number)
        except TimeoutError:
            self.ended.append(f"{process.name} did not end: {''.join(process.lines[-12:])}")
            await process.stop(signal.SIGKILL)

    def _forget(self, process: Process) -> None:
        self._told.add(process.process.pid)
        if process in self.workers:
            self.workers.remove(process)
        if process in self.gateways:
            del self.urls[self.gateways.index(process)]
            self.gateways.remove(process)

    def check_processes(self) -> None:
        """Note processes that ended by themselves."""
        for process in [*self.workers, *self.gateways]:
            code = process.process.returncode
            if code is not None and process.process.pid not in self._told:
                self._forget(process)
                if not (self.are_deaths_expected and code == -signal.SIGKILL):
                    self.ended.append(
                        f"{process.name} ended with {code}: {''.join(process.lines[-12:])}"
                    )

    async def replace_missing(self) -> None:
        """As many gateways and workers as in the beginning."""
        self.check_processes()
        num_gateways, num_workers = self._num
        gone = num_workers - len(self.workers), num_gateways - len(self.gateways)
        await asyncio.gather(
            *(self.start_worker() for _ in range(gone[0])),
            *(self.start_gateway() for _ in range(gone[1])),
        )

    async def fail_over(self) -> None:
        """The broker's replica takes its place."""
        await self.broker.fail_over(self.draw)
        self.proxy.upstream_port = self.broker.port
        self.proxy.cut()

    async def owner_of(self, request_id: str) -> Process:
        """The worker that runs a request."""
        name = await self.redis.hget(self.keys.request(request_id), "worker")
        for process in self.workers:
            if any(name.decode() in line for line in process.lines):
                return process
        raise LookupError(f"{name} is none of ours")

    async def eventually(
        self, condition: Callable[[], Awaitable[bool]], *, timeout_s: float
    ) -> bool:
        """Whether `condition`, which asks the broker, becomes true in time."""
        give_up_at = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < give_up_at:
            with suppress(RedisError, OSError):
                if await condition():
                    return True
            await asyncio.sleep(0.002)  # nothing announces a state
        return False

    async def leftovers(self, *, timeout_s: float = 30.0) -> list[str]:
        """What is still queued or running when everything should have ended, and keys that would never expire."""
        found: list[str] = []

        async def is_drained() -> bool:
            found[:] = await self._entries()
            return not found

        await self.eventually(is_drained, timeout_s=timeout_s)
        return [*found, *await self._immortals()]

    async def _entries(self) -> list[str]:
        found = []
        for queue in self.keys.queues:
            length = await self.redis.xlen(queue)
            pending = (await self.redis.xpending(queue, GROUP))["pending"] if length else 0
            if length:
                found.append(f"stuck: {queue} holds {length} entries, {pending} of them leased")
        return found

    async def _immortals(self) -> list[str]:
        patterns = (self.keys.request("*"), self.keys.journal("*"), self.keys.watchers("*"))
        names = [name for pattern in patterns async for name in self.redis.scan_iter(pattern)]
        async with self.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.pttl(name)
            lifetimes = await pipeline.execute()
        return [
            f"stuck: {name.decode()} never expires"
            for name, lifetime in zip(names, lifetimes, strict=True)
            if lifetime == -1
        ]

    async def _stop(self) -> None:
        for process in self._fleet.processes:
            self._told.add(process.process.pid)
        await self._fleet.stop()
