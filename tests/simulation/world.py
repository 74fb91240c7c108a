"""A whole fleet in one event loop: the real `Worker` and the real reading end, a simulated network, drawn faults.

A `World` is one history: `World(seed, scenario).run()` plays it and returns what each client saw. The same seed plays the
same history again. Only HTTP is missing: a client here is a gateway's reading loop that comes back after its gateway died.
"""

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from unittest import mock

from redis.exceptions import RedisError

from common.errors import FleetError, Unavailable
from common.messages import Frame, GenerationRequest, Sampling, Stopping
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import RequestQueue
from common.subscriber import Subscriber
from common.token_journal import JournalReader, StreamDiverged, TokenJournal
from tests.simulation.lua import Lua
from tests.simulation.memory_broker import MemoryBroker
from tests.simulation.network import SimNetwork, Weather
from tests.simulation.process import SimProcess, adopt
from tests.simulation.scenarios import FAULTS, Scenario
from tests.simulation.streams import SeenStream
from tests.simulation.virtual_loop import PROCESS, VirtualLoop
from worker.engine.echo import load_echo
from worker.service.worker import Worker
from worker.settings import WorkerSettings

URL = "unix:///simulated"
LEASE_S = 1.5
CALM_AFTER_S = 12.0  # faults end here
MOST_DEATHS = 20
LIMIT_S = 120.0  # and by here every stream has ended


class World:
    """One history."""

    def __init__(self, seed: int, scenario: Scenario, lua: Lua) -> None:
        self.scenario = scenario
        self.draw = random.Random(seed)
        self.seed = seed
        self.loop = VirtualLoop(self.draw)
        self.broker = MemoryBroker(lua, self.loop.time)
        self.network = SimNetwork(self.broker, self.draw, scenario.weather)
        self.loop.network = self.network
        self.loop.set_task_factory(adopt)
        self.keys = ModelKeys("echo")
        self.salts: list[str] = []
        self.workers: list[SimProcess] = []
        self.gateways: list[SimProcess] = []
        self.gone: list[SimProcess] = []
        self.streams: list[SeenStream] = []
        self.log: list[str] = []
        self.num_kills = 0
        self.died: list[str] = []  # workers that ended by themselves, with why
        self._snapshots: list[tuple[float, tuple]] = []
        self._is_closing = False

    def run(self) -> list[SeenStream]:
        """Play it."""
        with ExitStack() as stack:
            for name in ("monotonic", "time", "perf_counter"):
                stack.enter_context(mock.patch.object(time, name, self.loop.time))
            stack.enter_context(mock.patch.object(random, "uniform", self.draw.uniform))
            asyncio.set_event_loop(None)
            try:
                self.loop.run_until_complete(self._play())
            finally:
                self.loop.run_until_complete(self._close())
                self.loop.close()
        return self.streams

    def say(self, text: str) -> None:
        self.log.append(f"{self.loop.time() - 1.7e9:8.3f} {text}")

    async def _play(self) -> None:
        for _ in range(self.scenario.num_workers):
            self.start_worker()
        for number in range(self.scenario.num_gateways):
            self.gateways.append(self._process(f"gateway-{number}"))
        clients = [
            asyncio.create_task(self._client(number)) for number in range(self.scenario.num_streams)
        ]
        faults = asyncio.create_task(self._faults())
        _, pending = await asyncio.wait(clients, timeout=LIMIT_S)
        for task in (*pending, faults):
            task.cancel()
        await asyncio.gather(*clients, faults, return_exceptions=True)
        for task in (*clients, faults):
            if not task.cancelled() and task.exception():
                raise task.exception()

    async def _close(self) -> None:
        """End what still runs, without a trace in the checks."""
        self._is_closing = True
        self.network.weather = Weather()
        self.network.is_down = False
        self.network.paused_until = 0.0
        for process in (*self.workers, *self.gateways, *self.gone):
            process.stopped_until = 0.0
            process.is_dead = True
            await self._cancel(process.tasks)
            for close in process.closers:
                await close()
        self.network.cut()
        await asyncio.sleep(10)

    # Processes

    def _process(self, name: str) -> SimProcess:
        return SimProcess(name, lambda: self.draw.uniform(0.3, 1.7) * self.scenario.step_s)

    def start_worker(self) -> None:
        if self._is_closing:
            return
        salt = f"salt-{len(self.salts)}"
        self.salts.append(salt)
        process = self._process(f"worker-{len(self.salts)}")
        self.workers.append(process)
        settings = WorkerSettings(
            model_id="echo",
            redis_url=URL,
            lease_s=LEASE_S,
            echo_salt=salt,
            max_batch_size=4,
            block_size=4,
            max_batch_total_tokens=1024,
            max_total_tokens=256,
        )

        async def main() -> None:
            redis = open_redis(URL)
            process.closers.append(redis.aclose)
            while True:  # as `wait_for_redis` does
                with suppress(RedisError, OSError):
                    await redis.ping()
                    break
                await asyncio.sleep(0.05)
            worker = Worker(settings, load_echo(settings), redis, executor=None)
            worker._publisher._clock = self.loop.time
            process.name += f" {worker._id}"
            code = await worker.serve()
            self.say(f"{process.name} ended with {code}")
            if process in self.workers:
                self.workers.remove(process)
                self.gone.append(process)
            if code:
                self.died.append(process.name)
                self.start_worker()

        task = process.start(main)
        task.add_done_callback(lambda task: self._worker_done(process, task))

    def _worker_done(self, process: SimProcess, task: asyncio.Task) -> None:
        if process.is_dead or task.cancelled() or not task.exception():
            return
        self.say(f"{process.name} died: {task.exception()!r}")
        if len(self.died) > MOST_DEATHS:
            raise AssertionError(f"workers die again and again: {self.died[-1]}")
        self.died.append(f"{process.name}: {task.exception()!r}")
        if process in self.workers:
            self.workers.remove(process)
            self.gone.append(process)
            self.start_worker()

    async def kill(self, process: SimProcess) -> None:
        """As kill -9: what is on the wire may still arrive."""
        process.is_dead = True
        for connection in [c for c in self.network.connections if c.process is process]:
            connection._lose()
        await self._cancel(process.tasks)

    async def _cancel(self, tasks: list[asyncio.Task]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Clients

    async def _client(self, number: int) -> None:
        """Ask, read, and come back to any gateway until there is an end."""
        await asyncio.sleep(self.draw.uniform(0, 4))
        stream = SeenStream(self._request(number))
        self.streams.append(stream)
        leaves_after = None
        if self.draw.random() < self.scenario.leave:
            leaves_after = self.draw.randrange(self.scenario.max_new_tokens)
        while not stream.is_ended:
            gateway = self.draw.choice(self.gateways)
            task = gateway.start(lambda: self._attach(stream, leaves_after))
            await asyncio.wait([task])
            if not task.cancelled() and task.exception():
                raise task.exception()
            await asyncio.sleep(0.05)

    def _request(self, number: int) -> GenerationRequest:
        length = self.draw.randint(1, 12)
        return GenerationRequest(
            id=f"request-{number}",
            model="echo",
            prompt_tokens=tuple(self.draw.randrange(0x61, 0x7B) for _ in range(length)),
            sampling=Sampling(),
            stopping=Stopping(max_new_tokens=self.draw.randint(1, self.scenario.max_new_tokens)),
            deadline_s=1000.0,
        )

    async def _attach(self, stream: SeenStream, leaves_after: int | None) -> None:
        """One connection of a client, inside a gateway."""
        stream.num_attachments += 1
        redis, request = open_redis(URL), stream.request
        PROCESS.get().closers.append(redis.aclose)
        queue = RequestQueue(redis, self.keys)
        async with Subscriber(URL) as subscriber:
            journal = TokenJournal(redis, self.keys, subscriber)
            last = stream.frames[-1][0] if stream.frames else -1

            async def restore(frames: Sequence[bytes]) -> bool:
                return await queue.restore(request, frames)

            expects = (last, stream.frames[-1][1].chain) if stream.frames else None
            async with journal.open(
                request.id, expects=expects, restore=restore if self.scenario.restores else None
            ) as reader:
                try:
                    if expects:
                        await reader.catch_up()
                    await queue.enqueue(request, max_waiting=1000)
                    if leaves_after is None:
                        reader.listen(lambda: self._take_ready(stream, reader, last))
                    async for item in reader:
                        _see(stream, item, last)
                        self._take_ready(stream, reader, last)
                        if leaves_after is not None and len(stream.frames) > leaves_after:
                            await queue.cancel(request.id)
                            stream.is_left = True
                            return
                except StreamDiverged:
                    stream.error = StreamDiverged.kind
                except (Unavailable, RedisError, OSError) as error:
                    self.say(f"{request.id} comes back: {error!r}")
                except FleetError as error:
                    stream.error = error.kind

    def _take_ready(self, stream: SeenStream, reader: JournalReader, last: int) -> None:
        """What a gateway does when frames come; its client may be behind."""
        if self.draw.random() < 0.8:
            for item in reader.take_ready():
                _see(stream, item, last)

    # Faults

    async def _faults(self) -> None:
        rates = {name: getattr(self.scenario, name) for name in FAULTS}
        total = sum(rates.values())
        self._snapshots.append((self.loop.time(), self.broker.snapshot()))
        if not total:
            return
        if self.scenario.roll_back:
            keeper = asyncio.create_task(self._keep_snapshots())
        ends_at = self.loop.time() + CALM_AFTER_S
        while True:
            await asyncio.sleep(self.draw.expovariate(total))
            if self.loop.time() > ends_at:
                break
            [name] = self.draw.choices(list(rates), rates.values())
            self.say(name)
            await getattr(self, f"_{name}")()
        self.network.weather = Weather()
        if self.scenario.roll_back:
            keeper.cancel()

    async def _keep_snapshots(self) -> None:
        while True:
            await asyncio.sleep(self.draw.uniform(0.05, 0.5))
            self._snapshots.append((self.loop.time(), self.broker.snapshot()))
            del self._snapshots[:-8]

    async def _kill_worker(self) -> None:
        if not self.workers:
            return
        process = self.workers.pop(self.draw.randrange(len(self.workers)))
        self.gone.append(process)
        self.say(f"  {process.name}")
        self.num_kills += 1
        await self.kill(process)
        self.loop.call_later(self.draw.uniform(0, 3), self.start_worker)

    async def _stop_worker(self) -> None:
        if self.workers:
            process = self.draw.choice(self.workers)
            for_s = LEASE_S * self.draw.uniform(0.1, 1.7)
            self.say(f"  {process.name} for {for_s:.3f}")
            process.stopped_until = self.loop.time() + for_s

    async def _drain_worker(self) -> None:
        running = [process for process in self.workers if process.handlers]
        if running:
            process = self.draw.choice(running)
            self.say(f"  {process.name}")
            process.handlers.pop(signal.SIGTERM)()
            process.handlers.clear()
            self.loop.call_later(self.draw.uniform(0, 1), self.start_worker)

    async def _kill_gateway(self) -> None:
        number = self.draw.randrange(len(self.gateways))
        process, self.gateways[number] = self.gateways[number], self._process(f"gateway-{number}")
        self.gone.append(process)
        await self.kill(process)

    async def _cut_all(self) -> None:
        share = self.draw.choice((0.5, 1.0))
        self.network.cut(lambda connection: self.draw.random() < share)

    async def _pause_broker(self) -> None:
        self.network.paused_until = self.loop.time() + self.draw.uniform(0.1, 5.0)

    async def _restart_broker(self) -> None:
        await self._down(self.broker.snapshot())

    async def _roll_back(self) -> None:
        taken_at, snapshot = self.draw.choice(self._snapshots)
        self.say(f"  to {taken_at - 1.7e9:.3f}")
        self._snapshots.clear()
        await self._down(snapshot)
        self._snapshots.append((self.loop.time(), self.broker.snapshot()))

    async def _wipe(self) -> None:
        await self._down(({}, {}))

    async def _down(self, snapshot: tuple) -> None:
        self.network.is_down = True
        self.network.cut()
        await asyncio.sleep(self.draw.uniform(0.05, 1.0))
        self.broker.restore(snapshot)
        self.network.is_down = False

    async def _flush_scripts(self) -> None:
        self.broker.execute(b"SCRIPT", b"FLUSH")


def _see(stream: SeenStream, item: tuple[int, Frame], last: int) -> None:
    """Note a frame, unless it is one of those up to `last`, which the client had when it came back."""
    if item[0] > last:
        stream.frames.append(item)
