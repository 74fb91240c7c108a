"""The rows of the fault matrix: what is done to a fleet, in which phases, and which explicit errors are honest then."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from common.errors import DeadlineExceeded, RequestNotFound
from common.token_journal import StreamDiverged
from tests.chaos import broker_faults, client_faults, process_faults
from tests.chaos.arena import Arena
from tests.chaos.client import Observation

DIVERGED = frozenset({StreamDiverged.kind})
LATE = frozenset({DeadlineExceeded.kind})
UNKNOWN = frozenset(
    {RequestNotFound.kind}
)  # told to a client that only GETs, when all who knew it are gone

NUM_TOKENS = 16
# Nearly all of the prompt, which the echo model gives back: whoever took it over still writes when the first one wakes.
NUM_TOKENS_PAUSED = 40

Act = Callable[[Arena, Observation], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the matrix."""

    name: str
    inject: Act
    phases: str = "0123456"
    prepare: Act | None = None  # before the stream begins
    needs_resuming: bool = False  # a plain client cannot survive it
    is_plain: bool = False  # its client must be a plain one
    allowed: frozenset[str] = (
        frozenset()
    )  # explicit errors: where the broker lost data, or the deadline passed
    needs_shards: bool = False  # on a model in two shards rather than the echo model
    is_stormy: bool = True  # may come at any time
    num_tokens: int = NUM_TOKENS  # of the stream that is looked at


_p, _b, _c = process_faults, broker_faults, client_faults

_ROWS = (
    Fault("worker kill -9", _p.kill_worker, "123456"),
    Fault("worker SIGTERM", _p.drain_worker, "123456"),
    Fault("worker pause > lease", _p.pause_worker_long, "2346", num_tokens=NUM_TOKENS_PAUSED),
    Fault("worker pause < lease", _p.pause_worker_short, "2346"),
    Fault("shard kill -9", _p.kill_shard, "234", needs_shards=True, is_stormy=False),
    Fault("shard stopped", _p.stop_shard, "234", needs_shards=True, is_stormy=False),
    Fault("gateway kill -9", _p.kill_gateway, needs_resuming=True),
    Fault("gateway pause", _p.pause_gateway, "123456"),
    Fault("pub/sub cut", _b.cut_channels),
    Fault("half of connections cut", _b.cut_half),
    Fault("replies dropped", _b.drop_replies),
    Fault("black hole", _b.black_hole),
    Fault("connections refused", _b.refuse_connections),
    Fault("slow link", _b.slow_link),
    Fault("broker pause", _b.pause_broker),
    Fault("broker kill -9 + AOF", _b.kill_broker),
    Fault(
        "broker kill -9, slow fsync",
        _b.kill_broker,
        prepare=_b.make_sync_slow,
        allowed=DIVERGED,
        is_stormy=False,
    ),
    Fault("broker rolled back", _b.roll_back_broker, allowed=DIVERGED),
    Fault("broker wiped", _b.wipe_broker, allowed=DIVERGED),
    Fault(
        "failover, lost tail",
        _b.fail_over,
        prepare=_b.add_replica,
        allowed=DIVERGED,
        is_stormy=False,
    ),
    Fault(
        "gateway and broker lost",
        _b.kill_gateway_and_broker,
        needs_resuming=True,
        allowed=DIVERGED | UNKNOWN,
    ),
    Fault("memory full", _b.fill_memory),
    Fault("script cache gone", _b.flush_scripts),
    Fault("disk full", _b.fill_disk),
    Fault("broker clock +1 h", _b.set_broker_forward, allowed=LATE),
    Fault("broker clock -1 h", _b.set_broker_back),
    Fault("others' clocks +-1 h", _p.set_fleet_clocks),
    Fault("poison", _p.send_poison, "123", is_stormy=False),
    Fault("slow client", _c.slow_client, "3456", is_stormy=False),
    Fault("client abort", _c.abort_client, "012346", is_plain=True, is_stormy=False),
    Fault("duplicate POST", _c.read_twice, needs_resuming=True, is_stormy=False),
    Fault("rolling upgrade", _p.roll_upgrade, is_stormy=False),
)
FAULTS = {fault.name: fault for fault in _ROWS}
