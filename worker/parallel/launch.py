"""`tokenfleet worker --num-shard N`: starts a process for each shard, and keeps the group alive.

The launcher is a process of its own, above all shards, rank 0 included. It imports no torch and takes
part in no collective, so nothing that befalls a shard can befall it: when one has died or is stuck,
the others, which wait for it and cannot know, are ended with it (SIGKILL: an orderly end could hang in
the same collective), and a new group is started. What the old one was generating is in the journals;
this worker's or another's reaper puts it back into the queue.

Were rank 0 the parent, as in engines without a queue behind them, its own hang would need another
watcher.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import replace

from common.child import Child, describe_exit
from common.errors import FleetError
from common.settings import to_arguments
from common.supervisor import Service, Supervisor
from common.telemetry import configure_logging
from worker.parallel.beats import ShardHealth, ShardState
from worker.parallel.wiring import GroupWiring
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

POLL_S = 0.05
# Rank 0's collectives fail at once when its peers are gone: it then takes its heartbeat out of the
# registry, and its requests need not wait until that expires.
FAREWELL_S = 1.0
# A group that ends in good order, rank by rank.
PARTING_S = 5.0
STOP_MARGIN_S = 5.0  # on top of the time that rank 0 gives itself for draining
EXIT_STUCK = 1
EXIT_KILLED = 130  # as a shell reports a program that Ctrl-C ended


def run_group(settings: WorkerSettings, given: Collection[str]) -> int:
    """Serve with several shards until SIGTERM or SIGINT; the exit code.

    Args:
        given: names of the settings that the command line gave; the environment reaches the shards
            by itself, and so no secret of it stands on a command line.
    """
    configure_logging(settings.log_level, settings.json_output)
    try:
        return asyncio.run(_keep_running(settings, given))
    except FleetError as error:
        log.error("%s", error)
        return 1


async def _keep_running(settings: WorkerSettings, given: Collection[str]) -> int:
    groups: list[ShardGroup] = []

    def start() -> ShardGroup:
        groups[:] = [ShardGroup(settings, given)]
        return groups[0]

    async def is_loaded() -> bool:
        return groups[0].is_loaded

    service = Service("the group of shards", start, grace_s=settings.drain_s + STOP_MARGIN_S)
    async with Supervisor([[service]]) as supervisor:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.request_stop)
        await supervisor.until_ready(is_loaded)
        await supervisor.until_stop_requested()
    return EXIT_KILLED if supervisor.was_killed else 0


class ShardGroup:
    """One life of a group, from start to end. To a `Service` it is what a `Child` is."""

    def __init__(self, settings: WorkerSettings, given: Collection[str]) -> None:
        """Start all shards of this machine. Raises FleetError."""
        self._settings = settings
        self._has_rank_0 = settings.node_rank == 0
        self._exit_code: int | None = None  # of the shard that ended first
        self._give_up_at = 0.0
        try:
            wiring = GroupWiring(settings)
        except OSError as error:
            raise FleetError(
                f"cannot listen on {settings.master_addr}:{settings.master_port or 'any port'}, "
                f"where the shards are to meet: {error.strerror}. Choose another --master-port"
            ) from error
        self._board = wiring.board
        self._shards: list[Child] = []
        try:
            for local_rank in range(settings.num_local_shards):
                self._shards.append(_start(settings, given, wiring, local_rank))
        except BaseException:
            self.kill()
            raise
        finally:
            wiring.close()

    @property
    def pid(self) -> int:
        return self._shards[0].pid

    @property
    def is_loaded(self) -> bool:
        """Whether every shard has its weights."""
        return all(health.state is not ShardState.LOADING for health in self._board.read())

    @property
    def exit_code(self) -> int | None:
        """None while a shard runs. To ask is to watch: the first failure that is seen ends the
        group."""
        codes = [shard.exit_code for shard in self._shards]
        if self._exit_code is None:
            self._look_for_an_end(codes)
        if self._exit_code is None or None not in codes:
            return self._exit_code
        if time.monotonic() > self._give_up_at:
            self.kill()
        return None

    async def exited(self) -> int:
        """Watch until the group has ended."""
        while (code := self.exit_code) is None:
            await asyncio.sleep(POLL_S)
        return code

    def terminate(self) -> None:
        """Ask rank 0 to drain; it lets the others go when it is done. On a machine without rank 0,
        end: the whole group ends with it."""
        if self._has_rank_0:
            self._shards[0].terminate()
        else:
            self.kill()

    def kill(self) -> None:
        """End all shards at once."""
        for shard in self._shards:
            shard.kill()

    def _look_for_an_end(self, codes: list[int | None]) -> None:
        """Notice the first shard that ended or is stuck, and let that be the end of all."""
        ended = [local_rank for local_rank, code in enumerate(codes) if code is not None]
        failed = [local_rank for local_rank in ended if codes[local_rank]]
        stuck = self._stuck()
        if failed:
            first = min(failed, key=lambda local_rank: codes[local_rank])  # by a signal, if any was
            self._fail(codes[first], self._name(first), describe_exit(codes[first]))
        elif ended:
            self._exit_code = 0
            self._give_up_at = time.monotonic() + PARTING_S
        elif stuck:
            since_s = max(stuck.silent_s, stuck.stalled_s)
            how = f"no sign of life for {since_s:.1f} s, last in step {stuck.step}"
            self._fail(EXIT_STUCK, self._name(stuck.rank), how)

    def _stuck(self) -> ShardHealth | None:
        """The shard that is stuck. One that is silent is the cause, those that wait for it only
        stall."""
        limit_s = self._settings.shard_timeout_s
        board = self._board.read()
        silent = [health for health in board if health.silent_s > limit_s]
        stalled = [health for health in board if health.stalled_s > limit_s]
        # Of stalled ones, the cause is the one that has come least far.
        return min(silent or stalled, key=lambda health: health.step, default=None)

    def _fail(self, code: int, name: str, how: str) -> None:
        log.error("%s is lost (%s): the group ends and its requests go back", name, how)
        self._exit_code = code
        self._give_up_at = time.monotonic() + FAREWELL_S
        for shard in self._shards[self._has_rank_0 :]:
            shard.kill()

    def _name(self, local_rank: int) -> str:
        rank = self._settings.node_rank * len(self._shards) + local_rank
        return f"shard {rank} of {self._settings.num_shard}"


def _start(
    settings: WorkerSettings, given: Collection[str], wiring: GroupWiring, local_rank: int
) -> Child:
    place = wiring.options(local_rank)
    arguments = to_arguments(replace(settings, **place), only={*given, *place})
    # -P, because a folder named `worker` where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "worker", *arguments]
    # Shards of one machine need not be reachable from others. Gloo would listen on all of it.
    defaults = {"GLOO_SOCKET_IFNAME": _loopback()} if settings.num_nodes == 1 else {}
    return Child(command, pass_fds=wiring.fds(local_rank), defaults=defaults)


def _loopback() -> str:
    return "lo" if sys.platform == "linux" else "lo0"
