"""Readers get every frame once and in order, whatever pub/sub does."""

import asyncio
import gc
import weakref

import pytest
from redis.asyncio import Redis

from common.codec import encode_frame
from common.redis_keys import ModelKeys
from common.subscriber import Subscriber
from common.token_journal import StreamDiverged, TokenJournal
from tests.requests import frames_of

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

TEXTS = [f"t{number}" for number in range(20)]


@pytest.fixture
async def subscriber(redis_url: str):
    async with Subscriber(redis_url) as subscriber:
        yield subscriber


@pytest.fixture
def journal(redis: Redis, keys: ModelKeys, subscriber: Subscriber) -> TokenJournal:
    return TokenJournal(redis, keys, subscriber)


class Writer:
    """Appends to a journal as STEP does, or forgets to publish."""

    def __init__(self, redis: Redis, keys: ModelKeys, request_id: str) -> None:
        self.redis, self.keys, self.id = redis, keys, request_id
        self.frames = frames_of(request_id, TEXTS)

    async def append(self, index: int, *, is_published: bool = True) -> None:
        data = encode_frame(self.frames[index])
        await self.redis.rpush(self.keys.journal(self.id), data)
        if is_published:
            await self.redis.publish(self.keys.channel(self.id), b"%d:%s" % (index, data))


@pytest.fixture
def writer(redis: Redis, keys: ModelKeys) -> Writer:
    return Writer(redis, keys, "r1")


async def collect(reader, count: int = len(TEXTS)):
    found = []
    async for index, frame in reader:
        found.append((index, frame))
        if len(found) == count:
            break
    return found


async def test_frames_arrive_once_and_in_order(journal: TokenJournal, writer: Writer):
    async with journal.open("r1") as reader:
        reading = asyncio.create_task(collect(reader, count=100))
        for index in range(len(TEXTS)):
            await writer.append(index)
        assert await reading == list(enumerate(writer.frames)), (
            "and the terminal frame ends the iteration"
        )


async def test_reader_that_comes_late_replays(journal: TokenJournal, writer: Writer):
    for index in range(len(TEXTS)):
        await writer.append(index, is_published=False)
    async with journal.open("r1") as reader:
        assert await collect(reader) == list(enumerate(writer.frames))


async def test_lost_messages_are_read_from_the_journal(journal: TokenJournal, writer: Writer):
    async with journal.open("r1") as reader:
        reading = asyncio.create_task(collect(reader))
        for index in range(len(TEXTS)):
            await writer.append(index, is_published=index % 3 == 0)
        assert await reading == list(enumerate(writer.frames)), (
            "the unpublished last one by the tick"
        )


async def test_cut_connection_heals(journal: TokenJournal, writer: Writer, redis: Redis):
    async with journal.open("r1") as reader:
        reading = asyncio.create_task(collect(reader))
        for index in range(len(TEXTS)):
            await writer.append(index)
            if index % 5 == 0:
                await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        assert await reading == list(enumerate(writer.frames))


async def test_two_readers_of_one_request(journal: TokenJournal, writer: Writer):
    async with journal.open("r1") as one, journal.open("r1") as two:
        readings = [asyncio.create_task(collect(reader)) for reader in (one, two)]
        for index in range(len(TEXTS)):
            await writer.append(index)
        assert await asyncio.gather(*readings) == [list(enumerate(writer.frames))] * 2


async def test_spliced_stream_is_an_error(journal: TokenJournal, writer: Writer):
    await writer.append(0)
    writer.frames = frames_of("r1", ["other", *TEXTS[1:]])
    await writer.append(1)
    async with journal.open("r1") as reader:
        with pytest.raises(StreamDiverged):
            await collect(reader)


async def test_slow_reader_costs_bounded_memory(
    journal: TokenJournal, redis: Redis, keys: ModelKeys
):
    writer = Writer(redis, keys, "r1")
    writer.frames = frames_of("r1", ["x"] * 2000)
    async with journal.open("r1") as reader:
        for index in range(2000):
            await writer.append(index)
        waiting = len(reader._subscription._messages)
        assert waiting <= 256
        assert await collect(reader, count=2000) == list(enumerate(writer.frames))


async def test_nothing_is_left_behind(
    journal: TokenJournal, subscriber: Subscriber, writer: Writer
):
    async with journal.open("r1") as reader:
        await writer.append(0)
        await anext(reader)
    assert subscriber.num_channels == 0


async def test_the_broker_hears_of_it_with_what_is_told_next(
    journal: TokenJournal, redis: Redis, keys: ModelKeys
):
    async with journal.open("r1"), asyncio.timeout(5):
        while dict(await redis.pubsub_numsub(keys.channel("r1"))) != {
            keys.channel("r1").encode(): 1
        }:
            await asyncio.sleep(0)
    async with journal.open("r2"), asyncio.timeout(5):
        while dict(await redis.pubsub_numsub(keys.channel("r1"))) != {
            keys.channel("r1").encode(): 0
        }:
            await asyncio.sleep(0)


async def test_a_reader_is_gone_with_its_stream(journal: TokenJournal, writer: Writer):
    """At once: the frames of a long answer must not wait for the garbage collector."""
    gc.disable()
    try:
        async with journal.open("r1") as reader:
            reader.listen(reader.take_ready)
            await writer.append(0)
            assert await anext(reader) == (0, writer.frames[0])
            left = weakref.ref(reader)
        del reader
        assert left() is None
    finally:
        gc.enable()
