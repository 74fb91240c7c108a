"""Frames that are here already can be taken without waiting, and nothing is lost by it."""

import asyncio

import pytest

from common.codec import encode_frame
from common.messages import Failure, Frame
from common.redis_keys import ModelKeys
from common.subscriber import Subscription
from common.token_journal import JournalReader, StreamDiverged
from tests.requests import frames_of

FRAMES = frames_of("r1", ["a", "b", "c", "d"])


@pytest.fixture
def subscription() -> Subscription:
    return Subscription(b"channel")


@pytest.fixture
async def reader(subscription: Subscription) -> JournalReader:
    values = dict(expects=None, restore=None, hold_s=1.0)
    return JournalReader(None, ModelKeys("m"), "r1", subscription, **values)


def publish(subscription: Subscription, *indices: int, frames: list[Frame] = FRAMES) -> None:
    for index in indices:
        subscription.add(b"%d:%s" % (index, encode_frame(frames[index])))
    subscription.wake()


async def test_what_is_here_is_taken_in_order(reader: JournalReader, subscription: Subscription):
    publish(subscription, 0, 1, 2)
    assert await anext(reader) == (0, FRAMES[0])
    assert reader.take_ready() == [(1, FRAMES[1]), (2, FRAMES[2])]
    publish(subscription, 3)
    assert await anext(reader) == (3, FRAMES[3])
    assert reader.take_ready() == [], "that was the end"


async def test_a_gap_is_left_to_the_journal(reader: JournalReader, subscription: Subscription):
    publish(subscription, 0, 2)
    await anext(reader)
    assert reader.take_ready() == [] and subscription.take() == []
    assert subscription.must_look


async def test_who_must_look_takes_no_message_before(
    reader: JournalReader, subscription: Subscription
):
    publish(subscription, 0)
    await anext(reader)
    subscription.look()
    publish(subscription, 1)
    assert reader.take_ready() == []
    reader.nothing_missed()
    assert reader.take_ready() == [(1, FRAMES[1])]


async def test_too_many_messages_are_left_to_the_journal(
    reader: JournalReader, subscription: Subscription
):
    for _ in range(300):
        publish(subscription, 0)
    assert reader.take_ready() == [] and subscription.must_look


async def test_what_was_heard_twice_is_taken_once(
    reader: JournalReader, subscription: Subscription
):
    publish(subscription, 0, 0, 1, 0, 1, 2)
    await anext(reader)
    assert reader.take_ready() == [(1, FRAMES[1]), (2, FRAMES[2])]


async def test_a_failure_is_told_by_the_iteration(
    reader: JournalReader, subscription: Subscription
):
    failed = Frame(failure=Failure("generation", "boom"))
    publish(subscription, 0, 1, frames=[FRAMES[0], failed])
    await anext(reader)
    assert reader.take_ready() == []
    assert await anext(reader) == (1, failed)


async def test_a_splice_is_told_by_the_iteration(reader: JournalReader, subscription: Subscription):
    publish(subscription, 0, 1, 2, frames=[*FRAMES[:2], *frames_of("r1", ["x", "y", "z"])[2:]])
    await anext(reader)
    assert [*reader.take_ready(), *reader.take_ready()] == [(1, FRAMES[1])]
    async with asyncio.timeout(5):
        with pytest.raises(StreamDiverged):
            await anext(reader)


async def test_who_was_stopped_takes_nothing(reader: JournalReader, subscription: Subscription):
    publish(subscription, 0, 1)
    await anext(reader)
    reader.stop()
    assert reader.take_ready() == []
    with pytest.raises(StopAsyncIteration):
        await anext(reader)
