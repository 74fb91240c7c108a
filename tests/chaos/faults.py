"""The rows of the fault matrix: what can be done to a fleet, each a coroutine that returns when the fault is over."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.exceptions import RedisError

from tests.chaos.arena import LEASE_S, Arena
from tests.chaos.client import Observation
from tests.fleet import Process


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the matrix."""

    name: str
    inject: Callable[[Arena, Observation], Awaitable[None]]
    needs_resuming: bool = False  # a plain client cannot survive it
    loses_data: bool = False  # an explicit `stream_diverged` is allowed
    phases: str = "0123456"


async def _worker(arena: Arena, seen: Observation) -> Process:
    """The one that runs the stream, or any."""
    try:
        return await arena.owner_of(seen.seen.request.id)
    except (LookupError, AttributeError, RedisError):
        return arena.draw.choice(arena.workers)


def _gateway(arena: Arena, seen: Observation) -> Process:
    if seen.url in arena.urls:
        return arena.gateways[arena.urls.index(seen.url)]
    return arena.draw.choice(arena.gateways)


async def kill_worker(arena: Arena, seen: Observation) -> None:
    await arena.end(await _worker(arena, seen))
    await arena.replace_missing()


async def drain_worker(arena: Arena, seen: Observation) -> None:
    worker = await _worker(arena, seen)
    await arena.end(worker, signal.SIGTERM)
    await arena.replace_missing()


async def _pause(process: Process, for_s: float) -> None:
    process.send(signal.SIGSTOP)
    await asyncio.sleep(for_s)
    process.send(signal.SIGCONT)


async def pause_worker_long(arena: Arena, seen: Observation) -> None:
    await _pause(await _worker(arena, seen), 1.7 * LEASE_S)


async def pause_worker_short(arena: Arena, seen: Observation) -> None:
    await _pause(await _worker(arena, seen), 0.3 * LEASE_S)


async def kill_gateway(arena: Arena, seen: Observation) -> None:
    await arena.end(_gateway(arena, seen))
    await arena.replace_missing()


async def pause_gateway(arena: Arena, seen: Observation) -> None:
    await _pause(_gateway(arena, seen), 3.0)


async def cut_channels(arena: Arena, seen: Observation) -> None:
    await arena.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def cut_half(arena: Arena, seen: Observation) -> None:
    own = await arena.redis.client_id()
    for client in await arena.redis.client_list():
        if client["id"] != str(own) and arena.draw.random() < 0.5:
            await arena.redis.execute_command("CLIENT", "KILL", "ID", client["id"])


async def _mode(arena: Arena, mode: str, for_s: float) -> None:
    """Bytes are missing afterwards, so no connection may go on."""
    arena.proxy.mode = mode
    await asyncio.sleep(for_s)
    arena.proxy.cut()
    arena.proxy.mode = "pass"


async def drop_replies(arena: Arena, seen: Observation) -> None:
    await _mode(arena, "dropreply", arena.draw.uniform(0.05, 0.5))


async def black_hole(arena: Arena, seen: Observation) -> None:
    await _mode(arena, "blackhole", 4.0)


async def refuse_connections(arena: Arena, seen: Observation) -> None:
    arena.proxy.mode = "reset"
    arena.proxy.cut()
    await asyncio.sleep(1.0)
    arena.proxy.mode = "pass"


async def slow_link(arena: Arena, seen: Observation) -> None:
    arena.proxy.mode = f"delay:{arena.draw.randint(5, 100)}"
    await asyncio.sleep(2.0)
    arena.proxy.mode = "pass"


async def pause_broker(arena: Arena, seen: Observation) -> None:
    os.kill(arena.broker.pid, signal.SIGSTOP)
    await asyncio.sleep(arena.draw.choice((0.3, 2.0, 4.0)))
    os.kill(arena.broker.pid, signal.SIGCONT)


async def kill_broker(arena: Arena, seen: Observation) -> None:
    arena.restart_broker()


async def roll_back_broker(arena: Arena, seen: Observation) -> None:
    arena.copy_broker()
    await asyncio.sleep(arena.draw.uniform(0.05, 0.5))
    arena.roll_back_broker()


async def wipe_broker(arena: Arena, seen: Observation) -> None:
    arena.wipe_broker()


async def kill_gateway_and_broker(arena: Arena, seen: Observation) -> None:
    ending = asyncio.create_task(arena.end(_gateway(arena, seen)))
    arena.wipe_broker()
    await ending
    await arena.replace_missing()


async def fill_memory(arena: Arena, seen: Observation) -> None:
    await arena.redis.config_set("maxmemory", "1mb")
    await asyncio.sleep(2.0)
    await arena.redis.config_set("maxmemory", "1gb")


async def flush_scripts(arena: Arena, seen: Observation) -> None:
    await arena.redis.script_flush()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("worker kill -9", kill_worker, phases="123456"),
        Fault("worker SIGTERM", drain_worker, phases="123456"),
        Fault("worker pause > lease", pause_worker_long, phases="2346"),
        Fault("worker pause < lease", pause_worker_short, phases="2346"),
        Fault("gateway kill -9", kill_gateway, needs_resuming=True),
        Fault("gateway pause", pause_gateway, phases="123456"),
        Fault("pub/sub cut", cut_channels),
        Fault("half of connections cut", cut_half),
        Fault("replies dropped", drop_replies),
        Fault("black hole", black_hole),
        Fault("connections refused", refuse_connections),
        Fault("slow link", slow_link),
        Fault("broker pause", pause_broker),
        Fault("broker kill -9 + AOF", kill_broker),
        Fault("broker rolled back", roll_back_broker, loses_data=True),
        Fault("broker wiped", wipe_broker, loses_data=True),
        Fault(
            "gateway and broker lost",
            kill_gateway_and_broker,
            needs_resuming=True,
            loses_data=True,
        ),
        Fault("memory full", fill_memory),
        Fault("script cache gone", flush_scripts),
    )
}
