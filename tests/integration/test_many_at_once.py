"""Hundreds of streams that do the same at the same moment: leave, look at their journals, ask what waits."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from common.codec import encode_frame
from common.messages import OnDisconnect
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import QueueDepth, RequestQueue
from common.request_store import RequestStore
from common.subscriber import Subscriber
from common.token_journal import TokenJournal
from gateway.generation import Generator
from gateway.metrics import GatewayMetrics
from gateway.watching import Watches
from tests.requests import a_request, frames_of

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

NUM_STREAMS = 300
NUM_CONNECTIONS = 8  # of the pool


@pytest.fixture
async def crowded(redis_url: str) -> AsyncIterator[Redis]:
    """A client whose pool is far smaller than the crowd."""
    client = open_redis(redis_url, max_connections=NUM_CONNECTIONS)
    yield client
    await client.aclose()


@pytest.fixture
async def journal(redis_url: str, crowded: Redis, keys: ModelKeys) -> AsyncIterator[TokenJournal]:
    async with Subscriber(redis_url) as subscriber:
        yield TokenJournal(crowded, keys, subscriber)


async def test_all_who_leave_together_are_cancelled(
    crowded: Redis, redis: Redis, keys: ModelKeys, journal: TokenJournal
):
    queue, store = RequestQueue(crowded, keys), RequestStore(crowded, keys)
    generator = Generator(
        open_queue=lambda model: queue,
        open_journal=lambda model: journal,
        open_store=lambda model: store,
        watches=Watches(lambda model: store),
        metrics=GatewayMetrics(),
        max_waiting=NUM_STREAMS,
    )
    crowd, may_leave = asyncio.Barrier(NUM_STREAMS + 1), asyncio.Event()

    async def read(request) -> None:
        async with generator.stream(request):
            await crowd.wait()
            await may_leave.wait()

    requests = [a_request(on_disconnect=OnDisconnect.CANCEL) for _ in range(NUM_STREAMS)]
    reading = [asyncio.create_task(read(request)) for request in requests]
    await crowd.wait()
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    await generator.close()
    states = [await redis.hget(keys.request(request.id), "state") for request in requests]
    assert states == [b"cancelled"] * NUM_STREAMS


async def test_who_finds_every_connection_in_use_waits(crowded: Redis, keys: ModelKeys):
    queue = RequestQueue(crowded, keys)
    depths = await asyncio.gather(*(queue.depth() for _ in range(NUM_STREAMS)))
    assert depths == [QueueDepth(waiting=0, running=0)] * NUM_STREAMS


async def test_silent_streams_look_without_a_connection_of_their_own(
    crowded: Redis, redis: Redis, keys: ModelKeys, journal: TokenJournal
):
    """Nothing is published: each hears of its frame because it looks, after a second of silence."""

    async def read(request_id: str) -> int:
        async with journal.open(request_id) as reader:
            index, _ = await anext(reader)
            return index

    names = [f"r{number}" for number in range(NUM_STREAMS)]
    reading = [asyncio.create_task(read(name)) for name in names]
    for name in names:
        await redis.rpush(keys.journal(name), encode_frame(frames_of(name, ["a", "b"])[0]))
    assert await asyncio.gather(*reading) == [0] * NUM_STREAMS
    num_connections = [count for count, _ in crowded.connection_pool.get_connection_count()]
    assert num_connections == [0, 0], "idle and in use"
