"""A process that dies at an exact point of the protocol: the stream goes on, whichever point it is."""

import asyncio
import random

import pytest

from common.faults import FaultPoint
from tests.chaos.arena import Arena
from tests.chaos.campaign import PROMPT
from tests.chaos.client import ChaosClient
from tests.chaos.faults import NUM_TOKENS
from tests.simulation.streams import violations

WORKER_POINTS = [
    "lease.before_send",
    "lease.after_reply",
    "step.before_send#5",
    "step.after_reply#5",
    "publish.before_terminal",
    "publish.after_terminal",
]
GATEWAY_POINTS = ["enqueue.before_send", "enqueue.after_reply"]


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(180)
async def test_death_at_every_point_is_survived():
    draw = random.Random(3)
    async with Arena(draw, num_gateways=1, num_workers=1, step_ms=5) as arena:
        await arena.end(arena.workers[0])
        for point in WORKER_POINTS:
            doomed = await arena.start_worker("--fault-at", f"{point}:kill")
            reading = asyncio.create_task(
                ChaosClient(arena.urls, draw).run(
                    PROMPT, max_new_tokens=NUM_TOKENS, is_resuming=False
                )
            )
            await doomed.process.wait()
            assert any("fault point" in line for line in doomed.lines), point
            await arena.end(doomed)
            heir = await arena.start_worker()
            seen = await reading
            assert not [*violations(seen.seen, arena.salts), *seen.problems], point
            assert not seen.seen.error, point
            await arena.end(heir)
        await arena.start_worker()
        for point in GATEWAY_POINTS:
            [usual] = arena.urls
            doomed = await arena.start_gateway("--fault-at", f"{point}:kill")
            arena.urls.remove(usual)  # so that the client meets the doomed one first
            reading = asyncio.create_task(
                ChaosClient(arena.urls, draw).run(
                    PROMPT, max_new_tokens=NUM_TOKENS, is_resuming=True
                )
            )
            await doomed.process.wait()
            arena.gateways.remove(doomed)
            arena.urls[:] = [usual]  # in place: clients share the list
            seen = await reading
            assert not [*violations(seen.seen, arena.salts), *seen.problems], point
            assert not seen.seen.error, point


def test_unknown_point_is_refused():
    with pytest.raises(ValueError, match="lease.after_reply"):
        FaultPoint("lease.never:kill")
