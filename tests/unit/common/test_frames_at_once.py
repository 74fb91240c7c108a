"""Frames that come while nobody but the sink needs them: they wake no task, and the iteration tells all else."""

import asyncio
from collections.abc import Iterator

import pytest

from common.codec import encode_frame
from common.messages import Failure, Frame
from common.redis_keys import ModelKeys
from common.subscriber import Subscription
from common.token_journal import JournalReader, StreamDiverged
from tests.requests import frames_of

FRAMES = frames_of("r1", ["a", "b", "c", "d"])


class Listener:
    """An iteration that waits, and a sink that takes what it may."""

    def __init__(self) -> None:
        self.subscription = Subscription(b"channel")
        values = dict(expects=None, restore=None, hold_s=1.0)
        self.reader = JournalReader(None, ModelKeys("m"), "r1", self.subscription, **values)
        self.taken: list[int] = []
        self.is_open = True
        self.error: Exception | None = None
        self.reader.listen(self._take)

    def _take(self) -> None:
        if self.is_open:
            self.taken += [index for index, _ in self.reader.take_ready()]
        if self.error:
            raise self.error

    def publish(self, *indices: int, frames: list[Frame] = FRAMES) -> None:
        """Messages that come in one read."""
        for index in indices:
            self.subscription.add(b"%d:%s" % (index, encode_frame(frames[index])))
        self.subscription.wake()


@pytest.fixture
async def listener() -> Listener:
    return Listener()


@pytest.fixture
async def waiting(listener: Listener) -> Iterator[asyncio.Task]:
    task = asyncio.create_task(anext_of(listener.reader))
    await asyncio.sleep(0)
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def anext_of(reader: JournalReader) -> tuple[int, Frame] | None:
    return await anext(reader, None)


async def test_the_sink_takes_what_comes_and_wakes_nobody(listener: Listener, waiting):
    listener.publish(0, 1)
    listener.publish(2)
    assert listener.taken == [0, 1, 2]
    await asyncio.sleep(0)
    assert not waiting.done()


async def test_the_end_ends_the_iteration(listener: Listener, waiting):
    listener.publish(0, 1, 2, 3)
    assert listener.taken == [0, 1, 2, 3]
    assert await asyncio.wait_for(waiting, 5) is None


async def test_what_the_sink_leaves_the_iteration_has(listener: Listener, waiting):
    listener.is_open = False
    listener.publish(0, 1)
    assert await asyncio.wait_for(waiting, 5) == (0, FRAMES[0])
    assert listener.reader.take_ready() == [(1, FRAMES[1])]


async def test_nothing_is_taken_while_the_iteration_is_busy(listener: Listener):
    listener.publish(0, 1)
    assert listener.taken == []
    assert await anext(listener.reader) == (0, FRAMES[0])


async def test_a_failure_is_the_iterations(listener: Listener, waiting):
    failed = Frame(failure=Failure("generation", "boom"))
    listener.publish(0, 1, frames=[FRAMES[0], failed])
    assert listener.taken == [0]
    assert await asyncio.wait_for(waiting, 5) == (1, failed)


async def test_a_splice_is_the_iterations(listener: Listener, waiting):
    listener.publish(0, 1, frames=[FRAMES[0], frames_of("r1", ["x", "y"])[1]])
    assert listener.taken == [0]
    with pytest.raises(StreamDiverged):
        await asyncio.wait_for(waiting, 5)


async def test_the_iteration_raises_what_the_sink_raises(listener: Listener, waiting):
    listener.error = ValueError("cannot be shown")
    listener.publish(0)
    with pytest.raises(ValueError, match="cannot be shown"):
        await asyncio.wait_for(waiting, 5)


async def test_who_was_stopped_takes_nothing(listener: Listener, waiting):
    listener.reader.stop()
    listener.publish(0)
    assert listener.taken == []
    assert await asyncio.wait_for(waiting, 5) is None
