"""A fleet to break: gateways and workers as processes, a broker of its own, and a proxy between them."""

import asyncio
import random
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.broker import Broker, start_broker
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from tests.chaos.proxy import FaultProxy
from tests.fleet import Fleet, Process

LEASE_S = 1.5
AOF = "appendonlydir"


class Arena:
    """Use as `async with Arena(...) as arena`. `redis` goes to the broker directly, past the proxy."""

    def __init__(
        self,
        draw: random.Random,
        *,
        num_gateways: int = 2,
        num_workers: int = 2,
        step_ms: float = 25,
    ) -> None:
        self.draw = draw
        self.urls: list[str] = []
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.salts: list[str] = []
        self.keys = ModelKeys("echo")
        self.broker: Broker
        self.proxy: FaultProxy
        self.redis: Redis
        self.ended: list[
            str
        ] = []  # processes that ended though nobody told them to, with their log's end
        self._fleet: Fleet
        self._num = (num_gateways, num_workers)
        self._step_ms = step_ms
        self._told: set[int] = set()  # pids of those that were told to end
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        self._folder = folder
        self.broker = start_broker(folder, port=0)
        self._stack.callback(self.broker.kill)
        self.proxy = await self._stack.enter_async_context(FaultProxy(self.port))
        self.redis = open_redis(self.broker.url)
        self._stack.push_async_callback(self.redis.aclose)
        self._fleet = Fleet(self.proxy.url)
        self._stack.push_async_callback(self._stop)
        num_gateways, num_workers = self._num
        await asyncio.gather(*(self.start_worker() for _ in range(num_workers)))
        await asyncio.gather(*(self.start_gateway() for _ in range(num_gateways)))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def port(self) -> int:
        return int(self.broker.url.rpartition(":")[2].partition("/")[0])

    async def start_worker(self, *options: str) -> Process:
        salt = f"salt-{len(self.salts)}"
        self.salts.append(salt)
        process = await self._fleet.worker(
            *("--echo-salt", salt, "--echo-delay-ms", str(self._step_ms)),
            *("--lease-s", str(LEASE_S), *options),
        )
        self.workers.append(process)
        return process

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
                self.ended.append(
                    f"{process.name} ended with {code}: {''.join(process.lines[-12:])}"
                )

    def restart_broker(self) -> None:
        """kill -9, and up again with what the append-only file kept."""
        self.broker.kill()
        self.broker.start()

    def copy_broker(self) -> None:
        """Keep what the broker has written until now, for `roll_back_broker`."""
        shutil.rmtree(self._folder / "older", ignore_errors=True)
        shutil.copytree(self._folder / AOF, self._folder / "older")

    def roll_back_broker(self) -> None:
        """kill -9, and up again with what `copy_broker` kept: the writes since then are lost."""
        self.broker.kill()
        shutil.rmtree(self._folder / AOF)
        (self._folder / "older").rename(self._folder / AOF)
        self.broker.start()

    def wipe_broker(self) -> None:
        """kill -9, and up again with nothing."""
        self.broker.kill()
        shutil.rmtree(self._folder / AOF)
        self.broker.start()

    async def replace_missing(self) -> None:
        """As many gateways and workers as in the beginning."""
        self.check_processes()
        num_gateways, num_workers = self._num
        gone = num_workers - len(self.workers), num_gateways - len(self.gateways)
        await asyncio.gather(
            *(self.start_worker() for _ in range(gone[0])),
            *(self.start_gateway() for _ in range(gone[1])),
        )

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

    async def _stop(self) -> None:
        for process in self._fleet.processes:
            self._told.add(process.process.pid)
        await self._fleet.stop()
