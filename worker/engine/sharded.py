"""An engine in several processes. Rank 0 publishes each plan and runs its own part; the others run
theirs and answer nothing: what a layer needs from them, it gets by its collectives.

    rank 0     encode, send ──► step ──────────────► sample ──► result
                       │         │ collectives │
    others     receive ▼ ──────► step ─────────► receive ...

Tokens that rank 0 has chosen reach the others as the chunks of the next plan.
"""

import logging
import signal
import threading
from dataclasses import replace
from typing import Protocol

import torch

from common.errors import FleetError
from common.telemetry import configure_logging
from worker.engine.engine import build_engine
from worker.engine.loaded import Engine, LoadedModel
from worker.engine.plan import KvCacheLayout, StepPlan, StepResult
from worker.engine.resolve import resolve_dtype
from worker.parallel.beats import Beats
from worker.parallel.group import Shard, join_group, leave_group
from worker.parallel.plan_broadcast import PlanBroadcast
from worker.parallel.plan_codec import RowCodec
from worker.parallel.wiring import ShardWiring
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

PLANS = RowCodec(StepPlan)
THE_END = b""  # no plan is that short


class PlanSender(Protocol):
    """Rank 0's side of a channel of plans."""

    def send(self, message: bytes) -> None: ...


class PlanReceiver(Protocol):
    """The other shards' side."""

    def receive(self) -> bytes: ...


class ShardedEngine:
    """Rank 0 of a group, as an `Engine`."""

    def __init__(self, engine: Engine, plans: PlanSender, beats: Beats) -> None:
        self._engine = engine
        self._plans = plans
        self._beats = beats
        self._is_sound = True  # no step has failed, so all shards have run the same plans
        self._stepping = threading.Lock()

    @property
    def layout(self) -> KvCacheLayout:
        return self._engine.layout

    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan on all shards. Raises PeerLost when one of them is gone; no step may follow
        then."""
        with self._stepping:
            self._beats.begin(plan.step)
            self._is_sound = False
            self._plans.send(PLANS.encode(plan))
            result = self._engine.step(plan)
            self._is_sound = True
            self._beats.end()
        return result

    def close(self) -> None:
        """Let the others end too. After a failed step, or in the middle of one, nobody would listen:
        then it is for the launcher to end them."""
        if self._stepping.acquire(blocking=False) and self._is_sound:
            self._is_sound = False
            self._beats.stop()
            self._plans.send(THE_END)
            self._engine.close()
            leave_group()


def follow(engine: Engine, plans: PlanReceiver, beats: Beats) -> None:
    """What a shard above zero does: the same steps as rank 0, until rank 0 ends."""
    while message := plans.receive():
        plan = PLANS.decode(message)
        beats.begin(plan.step)
        engine.step(plan)
        beats.end()
    beats.stop()
    engine.close()


def load_sharded(settings: WorkerSettings) -> LoadedModel:
    """Load rank 0's part, as the launcher started it. Raises FleetError."""
    wiring, beats, shard = _join(settings)
    loaded = build_engine(settings, shard)
    plans = PlanBroadcast(shard.control) if settings.num_nodes > 1 else wiring.writer()
    beats.start()
    return replace(loaded, engine=ShardedEngine(loaded.engine, plans, beats))


def run_follower(settings: WorkerSettings) -> int:
    """A shard above zero from start to end; the exit code."""
    configure_logging(settings.log_level, settings.json_output)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when rank 0 has drained
    try:
        wiring, beats, shard = _join(settings)
        engine = build_engine(settings, shard).engine
        plans = PlanBroadcast(shard.control) if settings.num_nodes > 1 else wiring.reader()
        beats.start()
        follow(engine, plans, beats)
    except FleetError as error:
        log.error("%s", error)
        return 1
    leave_group()
    return 0


def _join(settings: WorkerSettings) -> tuple[ShardWiring, Beats, Shard]:
    """Meet the other shards, and use the devices together once: every step will be watched, and the
    cache gets the memory that is left then. Raises FleetError."""
    wiring = ShardWiring.of(settings)
    beats = wiring.beats()
    has_cuda = settings.device != "cpu" and torch.cuda.is_available()
    if has_cuda and torch.cuda.device_count() < wiring.num_local:
        raise FleetError(
            "`num_shard` must not be more than there are GPUs: each shard needs one of its own. "
            f"Given: {wiring.num_local} shards on this machine, {torch.cuda.device_count()} GPUs"
        )
    shard = join_group(
        wiring.rank,
        settings.num_shard,
        (settings.master_addr, settings.master_port),
        has_cuda=has_cuda,
        local_size=wiring.num_local,
        listener=wiring.listener,
        progress=beats.progress,
    )
    device = torch.device("cuda", wiring.local_rank) if has_cuda else torch.device("cpu")
    shard.warm_up(device, resolve_dtype(settings, device))
    return wiring, beats, shard
