"""What clients do that a fleet must bear: read slowly, go away, come twice."""

import asyncio

from tests.chaos.arena import Arena
from tests.chaos.client import ChaosClient, Observation, new_observation


async def slow_client(arena: Arena, seen: Observation) -> None:
    seen.slow_s = 0.4
    await asyncio.sleep(3.0)
    seen.slow_s = 0.0


async def abort_client(arena: Arena, seen: Observation) -> None:
    """The client goes; from the moment in which the broker knows, only the terminal frame may follow."""
    seen.leave()
    name, journal = (
        make(seen.seen.request.id) for make in (arena.keys.request, arena.keys.journal)
    )
    lengths: list[int] = []

    async def has_ended() -> bool:
        async with arena.redis.pipeline(transaction=True) as pipeline:
            pipeline.hmget(name, "state", "cancel")
            pipeline.llen(journal)
            (state, cancel), length = await pipeline.execute()
        if cancel == b"1":
            lengths.append(length)
        return state not in (b"queued", b"running")

    if not await arena.eventually(has_ended, timeout_s=30):
        arena.findings.append("stuck: a request whose client went does not end")
    if lengths and lengths[-1] > lengths[0] + 1:
        arena.findings.append(f"ran on: {lengths[-1] - lengths[0]} frames after it was cancelled")


async def read_twice(arena: Arena, seen: Observation) -> None:
    """The same POST under the same key, and again: all read the one generation."""
    request = seen.seen.request
    prompt, length = bytes(request.prompt_tokens).decode(), request.stopping.max_new_tokens
    for _ in range(2):
        twin = new_observation(prompt, length, is_resuming=True)
        twin.key = seen.key
        reading = ChaosClient(arena.urls, arena.draw).run(
            prompt, max_new_tokens=length, is_resuming=True, observation=twin
        )
        arena.twins.append(asyncio.create_task(reading))
