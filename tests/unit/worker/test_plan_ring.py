"""Plans on their way to other shards: as bytes, through the ring, and the signs of life beside it."""

import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Grammar, GrammarKind, Sampling
from worker.engine.plan import Chunk, SequenceStart, StepPlan
from worker.parallel import plan_ring
from worker.parallel.beats import BeatBoard, Beats, ShardState, board_bytes
from worker.parallel.doorbell import Doorbell
from worker.parallel.plan_codec import RowCodec, RowError
from worker.parallel.plan_ring import NUM_SLOTS, RingReader, RingWriter, ring_bytes
from worker.parallel.shared_memory import create_shared_memory, map_shared_memory

ROOT = Path(__file__).parents[3]
SLOT_BYTES = 128
CODEC = RowCodec(StepPlan)


class Ends:
    """A ring with both its sides in this process."""

    def __init__(self, num_readers: int = 2, *, first: int = 0) -> None:
        memory = map_shared_memory(create_shared_memory(ring_bytes(num_readers, SLOT_BYTES)))
        self.memory = memory
        self.bells = [Doorbell.create() for _ in range(num_readers)]
        self.writer = RingWriter(memory, self.bells, slot_bytes=SLOT_BYTES, first=first)
        self.readers = [
            RingReader(
                memory,
                bell,
                reader=reader,
                num_readers=num_readers,
                slot_bytes=SLOT_BYTES,
                first=first,
            )
            for reader, bell in enumerate(self.bells)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for bell in self.bells:
            bell.close()


def num_pieces(message: bytes) -> int:
    return max(1, -(-len(message) // SLOT_BYTES))


@settings(deadline=None)
@given(
    messages=st.lists(st.binary(max_size=4 * SLOT_BYTES), max_size=20),
    first=st.one_of(st.just(0), st.integers(2**64 - 12, 2**64 - 1)),
    lag=st.integers(0, NUM_SLOTS),
)
def test_every_reader_gets_every_message(messages: list[bytes], first: int, lag: int) -> None:
    """Whatever the sizes, at any distance, and where the counters overflow."""
    with Ends(first=first) as ends:
        waiting: list[bytes] = []

        def drain(room: int) -> None:
            while sum(map(num_pieces, waiting)) > room:
                sent = waiting.pop(0)
                assert [reader.receive() for reader in ends.readers] == [sent, sent]

        for message in messages:
            drain(max(0, min(lag, NUM_SLOTS - num_pieces(message))))
            ends.writer.send(message)
            waiting.append(message)
        drain(0)


@pytest.mark.parametrize("first", [0, 2**64 - 5])
def test_a_message_longer_than_the_ring_flows_through_it(first: int) -> None:
    message = bytes(range(256)) * 20
    assert num_pieces(message) > 5 * NUM_SLOTS
    with Ends(1, first=first) as ends:
        sending = threading.Thread(target=ends.writer.send, args=(message,), daemon=True)
        sending.start()
        assert ends.readers[0].receive() == message
        sending.join()


def test_a_sleeping_reader_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_ring, "SLEEP_S", 60.0)  # the bell alone can end it
    with Ends(1) as ends:
        received: list[bytes] = []
        reading = threading.Thread(
            target=lambda: received.append(ends.readers[0].receive()), daemon=True
        )
        reading.start()
        sleeps = ends.writer.reader_word(0) + plan_ring._SLEEPS
        while not ends.writer._words[sleeps]:
            time.sleep(0)
        ends.writer.send(b"plan")
        reading.join(10)
        assert received == [b"plan"]


def test_a_half_written_piece_is_not_read() -> None:
    """As another processor may see it: the header is there before the payload is."""
    with Ends(1) as ends:
        ends.writer.send(b"the first plan")
        at = ends.writer.slot_word(0)
        ends.writer.payload(at, 3)[:] = b"???"
        assert ends.readers[0]._look() is None
        ends.writer.payload(at, 3)[:] = b"the"
        assert ends.readers[0].receive() == b"the first plan"


ECHO = """
import sys
from worker.parallel.doorbell import Doorbell
from worker.parallel.plan_ring import RingReader, RingWriter, ring_bytes
from worker.parallel.shared_memory import map_shared_memory

fd, there, back = map(int, sys.argv[1:])
memory = map_shared_memory(fd)
half = len(memory) // 2
reader = RingReader(memory[:half], Doorbell(reading=there), reader=0, num_readers=1)
writer = RingWriter(memory[half:], [Doorbell(writing=back)])
message = b"ready"
while message:
    writer.send(message)
    message = reader.receive()
"""


def test_two_processes() -> None:
    """Ten thousand messages there and back: none is lost, doubled, out of order or torn."""
    half = ring_bytes(1)
    fd = create_shared_memory(2 * half)
    there, back = Doorbell.create(), Doorbell.create()
    memory = map_shared_memory(fd)
    writer = RingWriter(memory[:half], [there])
    reader = RingReader(memory[half:], back, reader=0, num_readers=1)
    fds = (fd, there.reading, back.writing)
    command = [sys.executable, "-c", ECHO, *map(str, fds)]
    with subprocess.Popen(command, cwd=ROOT, pass_fds=fds) as other:
        assert reader.receive() == b"ready"
        for number in range(10_000):
            message = b"%d " % number * (number % 500 + 1)
            writer.send(message)
            assert reader.receive() == message
        writer.send(b"")
        assert other.wait(10) == 0
    there.close()
    back.close()


tokens = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
samplings = st.builds(
    Sampling,
    temperature=st.floats(allow_nan=False),
    logit_bias=st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 9)), max_size=3).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    grammar=st.none() | st.builds(Grammar, kind=st.sampled_from(GrammarKind), value=st.text()),
)
plans = st.builds(
    StepPlan,
    step=st.integers(0, 2**63),
    chunks=st.lists(
        st.builds(
            Chunk,
            slot=st.integers(0, 999),
            start=st.integers(0, 10**6),
            tokens=tokens,
            new_blocks=tokens,
            is_sampled=st.booleans(),
        ),
        max_size=5,
    ).map(tuple),
    started=st.lists(
        st.builds(
            SequenceStart,
            slot=st.integers(0, 999),
            prompt_tokens=tokens,
            output_tokens=tokens,
            sampling=samplings,
            min_new_tokens=st.integers(0, 9),
            prompt_logprobs=st.booleans(),
        ),
        max_size=2,
    ).map(tuple),
    released=tokens,
)


@given(plan=plans)
def test_a_plan_is_the_same_on_the_other_side(plan: StepPlan) -> None:
    decoded = CODEC.decode(CODEC.encode(plan))
    assert decoded == plan
    assert repr(decoded) == repr(plan)  # an enum of strings equals its string


@dataclass(frozen=True, slots=True)
class Chunked:
    """A step plan of tomorrow."""

    step: int
    extra: int | None = None


def test_another_version_is_refused() -> None:
    with pytest.raises(RowError, match="StepPlan is of another version .* run the same one"):
        CODEC.decode(RowCodec(Chunked).encode(Chunked(1)))
    with pytest.raises(RowError, match="not a StepPlan"):
        CODEC.decode(b"\xc1")


@dataclass(frozen=True, slots=True)
class Unfit:
    names: dict


def test_a_type_that_cannot_travel_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="dict.* cannot travel"):
        RowCodec(Unfit)


def test_health_tells_idle_from_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    memory = map_shared_memory(create_shared_memory(board_bytes(2)))
    board, beats = BeatBoard(memory, 2), Beats(memory, 1)
    assert [health.state for health in board.read()] == [ShardState.LOADING] * 2
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)  # as if it were stopped
    beats.start()
    clock = 103.0
    loading, idle = board.read()
    assert (loading.silent_s, loading.stalled_s) == (0, 0)
    assert (idle.state, idle.silent_s, idle.stalled_s) == (ShardState.IDLE, 3, 0)
    beats.begin(7)
    clock = 104.0
    assert (board.read()[1].step, board.read()[1].stalled_s) == (7, 1)
    beats.progress()
    assert board.read()[1].stalled_s == 0
    beats.end()
    clock = 105.0
    assert board.read()[1].stalled_s == 0
    beats.stop()
    assert board.read()[1].silent_s == 0


def test_a_living_process_is_never_silent() -> None:
    memory = map_shared_memory(create_shared_memory(board_bytes(1)))
    board, beats = BeatBoard(memory, 1), Beats(memory, 0)
    beats.start()
    first = beats._times[2]
    give_up_at = time.monotonic() + 10
    while beats._times[2] == first:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)  # shared memory announces nothing
    assert board.read()[0].silent_s < 1
    beats.stop()
