"""A group of real shard processes, for tests: gloo, the plan ring and followers, without a queue.

Starting processes that import torch is most of the time of such a test, so a group is started once
(by a fork server, which has imported it) and loads one checkpoint after the other.
"""

import multiprocessing
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch

from common.errors import FleetError
from worker.engine.engine import build_engine
from worker.engine.loaded import LoadedModel
from worker.engine.plan import KvCacheLayout, StepPlan, StepResult
from worker.engine.sharded import THE_END, ShardedEngine, follow
from worker.parallel.group import join_group
from worker.parallel.wiring import GroupWiring, ShardWiring
from worker.settings import WorkerSettings


class PassedFd:
    """A file descriptor that a child gets by pickling."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple:
        return _received, (reduction.DupFd(self.fd),)


def _received(passed: object) -> PassedFd:
    return PassedFd(passed.detach())


class ShardGroup:
    """`size` processes. `load` makes an engine of them; closing that makes room for the next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.layouts: list[KvCacheLayout] = []  # of every shard, as last loaded
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        settings = WorkerSettings(model_id="of the test", num_shard=size)
        wiring = GroupWiring(settings)
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            place = wiring.options(rank)
            fds = [PassedFd(fd) for fd in place.pop("shard_fds")]
            arguments = (replace(settings, **place), fds, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        wiring.close()

    def load(self, settings: WorkerSettings) -> LoadedModel:
        """What `build_engine` gives, with an engine that the processes run. Raises FleetError."""
        for connection in self._connections:
            connection.send(settings)
        answers = [connection.recv() for connection in self._connections]
        failures = [answer for answer in answers if isinstance(answer, FleetError)]
        if failures:
            assert len(failures) == len(answers), "what does not fit must fit on no shard"
            raise failures[0]
        self.layouts = [answer.layout for answer in answers]
        return replace(answers[0], engine=RemoteEngine(self._connections[0], answers[0].layout))

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(20)
            assert process.exitcode == 0


class RemoteEngine:
    """Rank 0's engine, at the other end of a pipe."""

    def __init__(self, connection: Connection, layout: KvCacheLayout) -> None:
        self._connection = connection
        self.layout = layout

    def step(self, plan: StepPlan) -> StepResult:
        self._connection.send(plan)
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)


def _serve(place: WorkerSettings, fds: list[PassedFd], connection: Connection) -> None:
    """One shard: load what comes, run plans until their end, and again."""
    torch.set_num_threads(1)
    wiring = ShardWiring.of(replace(place, shard_fds=tuple(one.fd for one in fds)))
    beats = wiring.beats()
    address = (place.master_addr, place.master_port)
    options = dict(has_cuda=False, listener=wiring.listener, progress=beats.progress)
    shard = join_group(wiring.rank, place.num_shard, address, **options)
    plans = wiring.reader() if wiring.rank else wiring.writer()
    while (settings := connection.recv()) is not None:
        try:
            loaded = build_engine(settings, shard)
        except FleetError as error:
            connection.send(error)
            continue
        connection.send(replace(loaded, engine=None))
        if wiring.rank:
            follow(loaded.engine, plans, beats)
            continue
        engine = ShardedEngine(loaded.engine, plans, beats)
        while (plan := connection.recv()) is not None:
            connection.send(engine.step(plan))
        plans.send(THE_END)
