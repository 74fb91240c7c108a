"""What becomes of a request when its reader leaves, decided on a fleet in memory."""

import asyncio

import pytest

from common.errors import Unavailable
from common.messages import OnDisconnect
from gateway.generation import Generator
from gateway.metrics import GatewayMetrics
from gateway.watching import Watches
from tests.requests import a_request


@pytest.fixture
def generator(fleet) -> Generator:
    fleet.answer = None
    return Generator(
        open_queue=lambda model: fleet,
        open_journal=lambda model: fleet,
        open_store=lambda model: fleet,
        watches=Watches(lambda model: fleet),
        metrics=GatewayMetrics(),
        max_waiting=10,
        grace_s=0.02,
    )


async def leave(generator: Generator, policy: OnDisconnect, **changes) -> str:
    request = a_request(on_disconnect=policy, **changes)
    async with generator.stream(request):
        return request.id


async def test_cancel_ends_it_at_once(generator, fleet, deadline):
    request_id = await leave(generator, OnDisconnect.CANCEL)
    assert await fleet.cancelled.get() == request_id


async def test_grace_ends_it_later(generator, fleet, deadline):
    request_id = await leave(generator, OnDisconnect.GRACE)
    assert fleet.cancelled.empty()
    assert await fleet.cancelled.get() == request_id


async def test_grace_spares_what_somebody_came_back_to(generator, fleet, deadline):
    asked = asyncio.Event()

    async def unwatch(request_id: str, watcher: str) -> int:
        asked.set()
        return 1

    fleet.unwatch = unwatch
    await leave(generator, OnDisconnect.GRACE)
    await asked.wait()
    await generator.close()
    assert fleet.cancelled.empty()


async def test_stopping_process_leaves_the_grace_to_the_workers(generator, fleet, deadline):
    await leave(generator, OnDisconnect.GRACE)
    await generator.close()
    assert fleet.cancelled.empty()


async def test_run_lets_it_run(generator, fleet):
    await leave(generator, OnDisconnect.RUN)
    await generator.close()
    assert fleet.cancelled.empty()


async def test_who_attaches_may_come_back(generator, fleet, deadline):
    request = a_request(on_disconnect=OnDisconnect.CANCEL)
    async with generator.attach(request):
        pass
    await generator.close()  # a `cancel` would be waited for, a grace is not
    assert fleet.cancelled.empty()


async def test_stream_that_was_held_too_long_can_be_resumed(generator, fleet):
    request = a_request(on_disconnect=OnDisconnect.CANCEL)
    with pytest.raises(Unavailable):
        async with generator.stream(request) as frames:
            fleet.push(request.id, Unavailable("away"))
            await anext(frames)
    await generator.close()
    assert fleet.cancelled.empty()
