"""What befalls gateways, workers and shards. A fault is a coroutine that returns when it is over."""

import asyncio
import os
import signal
from pathlib import Path

from redis.exceptions import RedisError

from tests.chaos.arena import LEASE_S, Arena
from tests.chaos.child import POISON
from tests.chaos.client import ChaosClient, Observation
from tests.chaos.surgery import shift_clock
from tests.fleet import Process

CLOCK_SHIFT_S = 3600


async def shift_clocks(pids: list[int], seconds: int) -> None:
    """For longer than a lease, then back."""
    for pid in pids:
        shift_clock(pid, seconds)
    await asyncio.sleep(1.5 * LEASE_S)
    for pid in pids:
        shift_clock(pid, 0)


async def worker_of(arena: Arena, seen: Observation) -> Process:
    """The one that runs the stream, or any."""
    try:
        return await arena.owner_of(seen.seen.request.id)
    except (LookupError, AttributeError, RedisError):
        return arena.draw.choice(arena.workers)


def gateway_of(arena: Arena, seen: Observation) -> Process:
    if seen.url in arena.urls:
        return arena.gateways[arena.urls.index(seen.url)]
    return arena.draw.choice(arena.gateways)


async def kill_worker(arena: Arena, seen: Observation) -> None:
    await arena.end(await worker_of(arena, seen))
    await arena.replace_missing()


async def drain_worker(arena: Arena, seen: Observation) -> None:
    worker = await worker_of(arena, seen)
    await arena.end(worker, signal.SIGTERM)
    await arena.replace_missing()


async def _pause(process: Process, for_s: float) -> None:
    process.send(signal.SIGSTOP)
    await asyncio.sleep(for_s)
    process.send(signal.SIGCONT)


async def pause_worker_long(arena: Arena, seen: Observation) -> None:
    await _pause(await worker_of(arena, seen), 1.7 * LEASE_S)


async def pause_worker_short(arena: Arena, seen: Observation) -> None:
    await _pause(await worker_of(arena, seen), 0.3 * LEASE_S)


async def kill_gateway(arena: Arena, seen: Observation) -> None:
    await arena.end(gateway_of(arena, seen))
    await arena.replace_missing()


async def pause_gateway(arena: Arena, seen: Observation) -> None:
    await _pause(gateway_of(arena, seen), 3.0)


async def set_fleet_clocks(arena: Arena, seen: Observation) -> None:
    """Each gateway and worker to another time."""
    processes = [*arena.gateways, *arena.workers]
    signs = [arena.draw.choice((-1, 1)) for _ in processes]
    await asyncio.gather(
        *(
            shift_clocks([process.process.pid], sign * CLOCK_SHIFT_S)
            for process, sign in zip(processes, signs, strict=True)
        )
    )


async def send_poison(arena: Arena, seen: Observation) -> None:
    """A request that ends every worker that tries it, three of them in the end; others take their places."""
    before = await arena.redis.xlen(arena.keys.dead_letters)
    arena.are_deaths_expected, is_over = True, asyncio.Event()
    replacing = asyncio.create_task(_replace_until(is_over, arena))
    told = await ChaosClient(arena.urls, arena.draw).run(
        f"{POISON} {arena.draw.random()}", max_new_tokens=4, is_resuming=True
    )
    is_over.set()
    await replacing
    arena.are_deaths_expected = False
    if told.seen.error != "generation" or told.seen.frames:
        arena.findings.append(f"poison: told {told.seen.error!r}, {len(told.seen.frames)} frames")
    letters = await arena.redis.xrevrange(arena.keys.dead_letters)
    ids = [row[b"id"].decode() for _, row in letters]
    if ids[: len(ids) - before] != [told.seen.request.id]:
        arena.findings.append(f"poison: new dead letters {ids[: len(ids) - before]}")


async def _replace_until(is_over: asyncio.Event, arena: Arena) -> None:
    """Not to be cancelled: a worker that is about to start would be left behind."""
    while not is_over.is_set():
        await arena.replace_missing()
        await asyncio.sleep(0.05)
    await arena.replace_missing()


async def roll_upgrade(arena: Arena, seen: Observation) -> None:
    """Every worker and gateway is replaced: first a new one, then SIGTERM for the old one."""
    for worker in list(arena.workers):
        await arena.start_worker()
        await arena.end(worker, signal.SIGTERM)
    for gateway in list(arena.gateways):
        await arena.start_gateway()
        await arena.end(gateway, signal.SIGTERM)


async def kill_shard(arena: Arena, seen: Observation) -> None:
    os.kill(await _shard(arena, seen), signal.SIGKILL)


async def stop_shard(arena: Arena, seen: Observation) -> None:
    """For ever: the launcher must see it and end the group."""
    os.kill(await _shard(arena, seen), signal.SIGSTOP)


async def _shard(arena: Arena, seen: Observation) -> int:
    """Rank 0 or 1 of the group that runs the stream."""
    launcher = (await worker_of(arena, seen)).process.pid
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(arena.draw.choice(children))
