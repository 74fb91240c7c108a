"""What the publisher does with each answer of the queue, against a queue that answers as told."""

import asyncio
from dataclasses import replace

import pytest

from common.errors import Unavailable
from common.request_queue import Append, Appended, Lease
from tests.requests import a_request, frames_of
from worker.engine.sequence import Sequence
from worker.service.output import Output
from worker.service.publisher import Publisher

OK = Appended(is_ok=True)


class ScriptedQueue:
    """Answers appends with what a test prepared, by default with success."""

    def __init__(self) -> None:
        self.calls: list[list[Append]] = []
        self.answers: list[object] = []
        self.released: list[str] = []
        self.is_answering = asyncio.Event()
        self.is_answering.set()

    async def append(self, appends, *, patience_s):
        self.calls.append(list(appends))
        await self.is_answering.wait()
        answer = self.answers.pop(0) if self.answers else [OK] * len(appends)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def release(self, token, queue, request_id):
        self.released.append(request_id)
        return True


class Scene:
    """A publisher with one open request, and the frames that its engine makes."""

    def __init__(self, texts=("a", "b", "c")) -> None:
        self.queue = ScriptedQueue()
        self.ended = []
        self.now = 0.0
        self.publisher = Publisher(
            self.queue,
            clock=lambda: self.now,
            on_end=lambda sequence, frame: self.ended.append(frame),
        )
        self.request = a_request()
        self.frames = frames_of(self.request.id, list(texts))
        self.lease = Lease("token", "queue", self.request, (), 0.0, 60.0)
        self.sequence = Sequence(self.request)
        self.publisher.open(self.sequence, self.lease)

    async def publish(self, index: int) -> None:
        await self.publisher.publish([Output(self.sequence, index, self.frames[index], index)])

    def sent(self) -> list[tuple[int, object]]:
        return [(append.base, append.frame) for call in self.queue.calls for append in call]


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_frames_go_out_in_order_and_the_end_is_told(scene: Scene):
    for index in range(3):
        await scene.publish(index)
    await scene.publisher.flush()
    assert scene.sent() == list(enumerate(scene.frames))
    assert scene.ended == [scene.frames[-1]] and scene.publisher.num_live == 0


async def test_request_without_a_frame_is_touched(scene: Scene):
    await scene.publisher.publish([])
    await scene.publisher.flush()
    assert scene.sent() == [(0, None)]


async def test_the_youngest_request_is_told_first(scene: Scene):
    young = a_request(id="r2")
    sequence, [frame, _] = Sequence(young), frames_of("r2", ["x", "y"])
    scene.publisher.open(sequence, replace(scene.lease, request=young))
    old = Output(scene.sequence, 0, scene.frames[0], 0)
    await scene.publisher.publish([old, Output(sequence, 0, frame, 0)])
    await scene.publisher.flush()
    assert [append.request_id for append in scene.queue.calls[0]] == ["r2", scene.request.id]


async def test_publishing_overlaps_but_stays_one_step_behind(scene: Scene):
    gate = asyncio.Event()
    append = scene.queue.append

    async def slow(appends, *, patience_s):
        await gate.wait()
        return await append(appends, patience_s=patience_s)

    scene.queue.append = slow
    await scene.publish(0)  # returns while the frame is on its way
    second = asyncio.create_task(scene.publish(1))
    await asyncio.wait([second], timeout=0.01)
    assert not second.done(), "a second step waits for the first"
    gate.set()
    await second


@pytest.mark.parametrize("answer", [Appended(is_fenced=True), Appended(is_cancelled=True)])
async def test_refused_request_is_dropped(scene: Scene, answer: Appended):
    scene.queue.answers = [[answer]]
    await scene.publish(0)
    await scene.publisher.flush()
    assert scene.publisher.take_lost() == [scene.sequence] and scene.publisher.take_lost() == []
    await scene.publish(1)
    await scene.publisher.flush()
    assert len(scene.queue.calls) == 1, "nothing more is sent for it"


async def test_lost_tail_is_sent_again(scene: Scene):
    await scene.publish(0)
    await scene.publish(1)
    await scene.publisher.flush()
    scene.queue.calls.clear()
    scene.queue.answers = [[Appended(resend_from=0)]]
    await scene.publish(2)
    await scene.publisher.flush()
    assert scene.sent() == [(2, scene.frames[2]), *enumerate(scene.frames)]
    assert scene.ended == [scene.frames[2]]


async def test_own_frame_found_in_the_journal_is_a_lost_reply(scene: Scene):
    scene.queue.answers = [[Appended(ahead=(scene.frames[0],))]]
    await scene.publish(0)
    await scene.publish(1)
    await scene.publisher.flush()
    assert scene.sent() == [(0, scene.frames[0]), (1, scene.frames[1])]
    assert scene.publisher.take_lost() == []


async def test_other_frames_in_the_journal_win(scene: Scene):
    other = frames_of(scene.request.id, ["x", "y", "z"])[:2]
    scene.queue.answers = [[Appended(ahead=tuple(other))]]
    scene.now = 10.0
    await scene.publish(0)
    await scene.publisher.flush()
    assert scene.publisher.take_lost() == [scene.sequence]
    assert scene.publisher.take_overtaken() == [
        replace(scene.lease, frames=tuple(other), left_s=50.0)
    ]


async def test_silent_broker_holds_the_decoding(scene: Scene):
    scene.queue.answers = [Unavailable("down"), Unavailable("down"), [OK]]
    await scene.publish(0)
    await scene.publisher.flush()
    assert scene.sent() == [(0, scene.frames[0])] * 3


async def test_deadline_ends_a_running_request(scene: Scene):
    await scene.publish(0)
    scene.now = 61.0
    await scene.publisher.publish([])
    await scene.publisher.flush()
    assert scene.sent()[-1][1].failure.kind == "deadline"
    assert scene.publisher.take_lost() == [scene.sequence]
    assert [frame.failure.kind for frame in scene.ended] == ["deadline"]


async def test_release_hands_back_what_is_live(scene: Scene):
    await scene.publish(0)
    assert await scene.publisher.release_all() == 1
    assert scene.queue.released == [scene.request.id] and scene.publisher.num_live == 0


async def test_request_that_was_lost_and_came_back_begins_anew(scene: Scene):
    """Its worker lives and leased it again, while the old lease's frame was still on its way."""
    scene.queue.is_answering.clear()
    scene.queue.answers = [[Appended(is_fenced=True)]]
    await scene.publish(0)
    again = Sequence(scene.request)
    scene.publisher.open(again, replace(scene.lease, token="another"))
    scene.queue.is_answering.set()
    await scene.publisher.flush()
    assert set(scene.publisher.take_lost()) == {scene.sequence}, "nobody decodes it any more"
    assert scene.request.id in scene.publisher, "the answer to the old lease is none to the new"
    await scene.publisher.publish([Output(again, 0, scene.frames[0], 0)])
    await scene.publisher.flush()
    assert scene.queue.calls[-1][0].token == "another"
    assert scene.sent()[-1] == (0, scene.frames[0])
