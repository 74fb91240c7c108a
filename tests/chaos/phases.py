"""The columns of the fault matrix: bring one stream to a point of its life and inject there.

    P0 before the reply of ENQUEUE   P1 queued   P2 leased, no token yet   P3 mid-stream
    P4 before the terminal frame     P5 terminal frame written, not yet read   P6 being resumed by another worker

The harness watches the journal directly; a step of the echo model takes long enough to act between two frames.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from tests.chaos.arena import Arena
from tests.chaos.client import Observation
from tests.fleet import Process

PHASES = ("P0", "P1", "P2", "P3", "P4", "P5", "P6")
_REACH_S = 15.0

Inject = Callable[[], Awaitable[None]]


async def inject_at(
    phase: str, arena: Arena, seen: Observation, reading: asyncio.Task, inject: Inject
) -> bool:
    """Call `inject` once the stream is there; whether it got there before it ended."""
    request, keys = seen.seen, arena.keys

    async def has_begun() -> bool:
        return seen.began.is_set()

    async def state() -> str:
        return ((await arena.redis.hget(keys.request(request.request.id), "state")) or b"").decode()

    async def length() -> int:
        return await arena.redis.llen(keys.journal(request.request.id))

    async def reached(condition: Callable[[], Awaitable[bool]]) -> bool:
        return await arena.eventually(condition, timeout_s=_REACH_S)

    if phase == "P0":  # the gateway takes some milliseconds to parse, validate and send
        await asyncio.sleep(arena.draw.uniform(0, 0.004))
        await inject()
        return True
    if not await reached(has_begun):
        return False
    last = request.request.stopping.max_new_tokens - 1

    async def is_leased() -> bool:
        return await state() == "running" and await length() == 0

    async def is_in_stream() -> bool:
        return await length() >= 3

    async def is_before_end() -> bool:
        return await length() >= last

    async def is_finished() -> bool:
        return await state() == "finished"

    async def is_resumed() -> bool:
        attempts = await arena.redis.hget(keys.request(request.request.id), "attempts")
        return await state() == "running" and int(attempts or 0) >= 2

    simple = {"P2": is_leased, "P3": is_in_stream, "P4": is_before_end}
    if phase in simple:
        is_there = await reached(simple[phase]) and not reading.done()
        await inject()
        return is_there
    if phase == "P5":
        is_there = await reached(is_before_end)
        for gateway in arena.gateways:
            gateway.send(signal.SIGSTOP)
        is_there = await reached(is_finished) and is_there
        await _inject_and_wake(arena.gateways, inject)
        return is_there
    assert phase == "P6"
    await reached(is_in_stream)
    await arena.end(await arena.owner_of(request.request.id))
    is_there = await reached(is_resumed)
    await inject()
    return is_there


async def inject_while_queued(arena: Arena, seen: Observation, inject: Inject) -> bool:
    """P1. All workers must be stopped before the request is sent."""

    async def is_queued() -> bool:
        name = arena.keys.request(seen.seen.request.id)
        return seen.began.is_set() and await arena.redis.hget(name, "state") == b"queued"

    is_there = await arena.eventually(is_queued, timeout_s=3.0)
    await _inject_and_wake(arena.workers, inject)
    return is_there


async def _inject_and_wake(stopped: list[Process], inject: Inject) -> None:
    """Inject while processes are stopped; they must run again for a fault that waits for them."""
    stopped = list(stopped)
    injecting = asyncio.create_task(inject())
    await asyncio.sleep(0.1)
    for process in stopped:
        if process.process.returncode is None:
            process.send(signal.SIGCONT)
    await injecting
