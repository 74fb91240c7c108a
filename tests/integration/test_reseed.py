"""A broker that forgot: the gateways give back what they relayed, and the streams go on as if nothing had been."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import pytest
from redis.asyncio import Redis

from common.codec import encode_frame
from common.messages import OnDisconnect
from common.redis_keys import ModelKeys
from common.request_queue import Append, RequestQueue
from common.subscriber import Subscriber
from common.token_journal import StreamDiverged, TokenJournal
from tests.fleet import Fleet, place_of, stream
from tests.requests import a_request, frames_of

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("long_deadline")]

TEXT = "The quick brown fox jumps over the lazy dog. "
TEXTS = [f"t{number}" for number in range(10)]


@pytest.fixture
async def queue(redis: Redis, keys: ModelKeys) -> RequestQueue:
    queue = RequestQueue(redis, keys)
    await queue.create_group()
    return queue


@pytest.fixture
async def journal(redis: Redis, redis_url: str, keys: ModelKeys) -> AsyncIterator[TokenJournal]:
    async with Subscriber(redis_url) as subscriber:
        yield TokenJournal(redis, keys, subscriber)


async def test_streams_survive_a_wiped_broker(fleet: Fleet, redis: Redis):
    """Salted workers: each makes another text, so a stream that was begun anew would not fit."""
    options = ("--echo-delay-ms", "40", "--lease-s", "1")
    await asyncio.gather(*(fleet.worker(*options, "--echo-salt", salt) for salt in "ab"))
    urls = await asyncio.gather(fleet.gateway(), fleet.gateway())
    has_begun = [asyncio.Event() for _ in range(6)]

    async def read(session: aiohttp.ClientSession, number: int) -> list:
        events = []
        async for event in stream(session, urls[number % 2], TEXT, max_new_tokens=40):
            events.append(event)
            if len(events) > number:
                has_begun[number].set()
        return events

    async with aiohttp.ClientSession() as session:
        reading = [asyncio.create_task(read(session, number)) for number in range(6)]
        for event in has_begun:
            await event.wait()
        await redis.flushall()
        found = await asyncio.gather(*reading)
    for events in found:
        assert "error" not in events[-1][1], events[-1]
        assert [place_of(event_id) for event_id, _ in events] == list(range(40))
        text = "".join(data["token"]["text"] for _, data in events)
        assert events[-1][1]["generated_text"] == text


async def test_waiting_request_is_queued_again(redis, keys, queue: RequestQueue, journal):
    request = a_request(on_disconnect=OnDisconnect.GRACE)
    async with journal.open(request.id, restore=partial(queue.restore, request)) as reader:
        await queue.enqueue(request, max_waiting=1)
        await redis.flushall()
        reading = asyncio.create_task(anext(reader))
        await queue.create_group()
        [entry] = [found for _ in range(5) for found in await queue.wait("w1")]
        [lease] = await queue.lease("w1", [entry])
        assert lease.request == request and entry.queue == keys.resume_queue
        frame = frames_of(request.id, TEXTS)[0]
        await queue.append([Append(request.id, lease.token, lease.queue, 0, frame)], patience_s=1)
        assert await reading == (0, frame)


async def test_lost_tail_is_given_back(redis: Redis, keys: ModelKeys, queue: RequestQueue):
    request = a_request()
    frames = [encode_frame(frame) for frame in frames_of(request.id, TEXTS)][:6]
    await queue.enqueue(request, max_waiting=1)
    await redis.rpush(keys.journal(request.id), *frames[:2])
    assert await queue.restore(request, frames)
    assert await redis.lrange(keys.journal(request.id), 0, -1) == frames
    assert await queue.restore(request, frames[:3]), "whoever relayed less has nothing to add"
    assert await redis.llen(keys.journal(request.id)) == 6
    assert (await queue.depth()).waiting == 1


async def test_other_continuation_is_never_spliced(redis, keys, queue: RequestQueue):
    request = a_request()
    ours = [encode_frame(frame) for frame in frames_of(request.id, TEXTS)][:4]
    theirs = [encode_frame(frame) for frame in frames_of(request.id, ["x", *TEXTS])][:2]
    await redis.rpush(keys.journal(request.id), *theirs)
    assert not await queue.restore(request, ours)
    assert await redis.lrange(keys.journal(request.id), 0, -1) == theirs
    assert (await queue.depth()).waiting == 0


async def test_ended_request_is_not_prolonged(redis, keys, queue: RequestQueue):
    request = a_request()
    frames = [encode_frame(frame) for frame in frames_of(request.id, TEXTS)][:4]
    await queue.enqueue(request, max_waiting=1)
    await redis.rpush(keys.journal(request.id), frames[0])
    await redis.hset(keys.request(request.id), "state", "finished")
    assert not await queue.restore(request, frames)
    assert await redis.llen(keys.journal(request.id)) == 1


async def test_seeded_journal_expires(redis, keys, queue: RequestQueue):
    request = a_request()
    assert await queue.restore(request, [encode_frame(frames_of(request.id, TEXTS)[0])])
    assert await redis.pttl(keys.journal(request.id)) > 0


async def test_message_of_another_past_is_an_error(redis, keys, queue: RequestQueue, journal):
    request = a_request()
    frames = frames_of(request.id, TEXTS)
    await queue.enqueue(request, max_waiting=1)
    await redis.rpush(keys.journal(request.id), *(encode_frame(frame) for frame in frames[:3]))
    other = encode_frame(frames_of(request.id, ["x", *TEXTS])[1])
    async with journal.open(request.id, restore=partial(queue.restore, request)) as reader:
        assert [(await anext(reader))[0] for _ in range(3)] == [0, 1, 2]
        await redis.publish(keys.channel(request.id), b"1:" + encode_frame(frames[1]))
        await redis.publish(keys.channel(request.id), b"1:" + other)
        with pytest.raises(StreamDiverged):
            await anext(reader)


def test_place_of_the_chain_in_a_frame():
    """RESEED reads it there."""
    for frame in frames_of("r", TEXTS):
        assert encode_frame(frame)[4:12] == frame.chain
