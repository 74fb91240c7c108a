"""Plans from rank 0 to the other shards of a machine, through shared memory.

One writer; every reader gets every message. Slots are used in turn, and a message longer than a slot
takes several:

    readers   | read 0, sleeps 0 | read 1, sleeps 1 | ...     how far each is; whether it sleeps
    slots     | sequence, length, is_last, checksum | payload |
              | sequence, length, is_last, checksum | payload |
              ...                          piece n is in slot n % NUM_SLOTS, its sequence is n + 1

A reader spins for a moment, because in a busy worker the next plan is near, and then sleeps at its
doorbell. Neither side needs a memory barrier, which Python does not have: a piece counts only once
its checksum, over sequence and payload, is right.
"""

import os
import time
import zlib
from collections.abc import Sequence

from worker.parallel.doorbell import Doorbell

NUM_SLOTS = 4
SLOT_BYTES = 64 * 1024
SPIN_S = 200e-6
# A bell can be missed if reader and writer look at the same moment and neither sees the other's
# last store; then the reader finds the plan this much later.
SLEEP_S = 0.05
_WRITER_PAUSE_S = 100e-6

_MASK = 2**64 - 1
_LINE = 64  # bytes of a cache line: no two processes write to the same one
_WORDS = _LINE // 8
_READ, _SLEEPS = 0, 1
_SEQUENCE, _LENGTH, _IS_LAST, _CHECKSUM = range(4)


def ring_bytes(num_readers: int, slot_bytes: int = SLOT_BYTES) -> int:
    """Memory that a ring takes."""
    return num_readers * _LINE + NUM_SLOTS * (_LINE + slot_bytes)


class _Ring:
    """The layout, over memory that both sides map. Sequences are counted modulo 2**64."""

    def __init__(self, memory: memoryview, num_readers: int, slot_bytes: int) -> None:
        assert len(memory) >= ring_bytes(num_readers, slot_bytes) and slot_bytes % _LINE == 0
        self._slot_bytes = slot_bytes
        self._num_readers = num_readers
        self._bytes = memory
        self._words = memory[: len(memory) // 8 * 8].cast("Q")

    def reader_word(self, reader: int) -> int:
        """Index of a reader's line in `_words`."""
        return reader * _WORDS

    def slot_word(self, number: int) -> int:
        """Index of the header of the slot of piece `number`."""
        size = (_LINE + self._slot_bytes) // 8
        return self._num_readers * _WORDS + number % NUM_SLOTS * size

    def payload(self, slot_word: int, length: int) -> memoryview:
        first = slot_word * 8 + _LINE
        return self._bytes[first : first + length]


class RingWriter(_Ring):
    """Rank 0's side."""

    def __init__(
        self,
        memory: memoryview,
        bells: Sequence[Doorbell],
        *,
        slot_bytes: int = SLOT_BYTES,
        first: int = 0,
    ) -> None:
        """`bells[i]` wakes reader i; `first` is the number of the first piece, the same on every
        side."""
        super().__init__(memory, len(bells), slot_bytes)
        self._bells = bells
        self._number = first
        for reader in range(len(bells)):
            self._words[self.reader_word(reader) + _READ] = first

    def send(self, message: bytes) -> None:
        """Publish one message. Waits while the slowest reader is a whole ring behind."""
        for first in range(0, len(message) or 1, self._slot_bytes):
            last = first + self._slot_bytes
            self._send_piece(message[first:last], is_last=last >= len(message))

    def _send_piece(self, piece: bytes, *, is_last: bool) -> None:
        while self._num_unread() >= NUM_SLOTS:
            time.sleep(_WRITER_PAUSE_S)
        words, at = self._words, self.slot_word(self._number)
        self._number = sequence = (self._number + 1) & _MASK
        self.payload(at, len(piece))[:] = piece
        words[at + _LENGTH] = len(piece)
        words[at + _IS_LAST] = is_last
        words[at + _CHECKSUM] = _checksum(piece, sequence, is_last)
        words[at + _SEQUENCE] = sequence
        for reader, bell in enumerate(self._bells):
            if words[self.reader_word(reader) + _SLEEPS]:
                bell.ring()

    def _num_unread(self) -> int:
        reads = (self._words[self.reader_word(reader)] for reader in range(self._num_readers))
        return max((self._number - read) & _MASK for read in reads)


class RingReader(_Ring):
    """The side of one other shard."""

    def __init__(
        self,
        memory: memoryview,
        bell: Doorbell,
        *,
        reader: int,
        num_readers: int,
        slot_bytes: int = SLOT_BYTES,
        first: int = 0,
    ) -> None:
        super().__init__(memory, num_readers, slot_bytes)
        self._own_word = self.reader_word(reader)
        self._bell = bell
        self._number = first

    def receive(self) -> bytes:
        """Wait for the next message."""
        pieces = []
        is_last = False
        while not is_last:
            piece, is_last = self._wait_for_piece()
            pieces.append(piece)
        return b"".join(pieces)

    def _wait_for_piece(self) -> tuple[bytes, bool]:
        spin_until = time.perf_counter() + SPIN_S
        while (found := self._look()) is None:
            if time.perf_counter() < spin_until:
                os.sched_yield()
            else:
                self._sleep()
        self._number = (self._number + 1) & _MASK
        self._words[self._own_word + _READ] = self._number
        return found

    def _sleep(self) -> None:
        """Say so, look once more, sleep: a writer that did not see us has written before we looked."""
        self._words[self._own_word + _SLEEPS] = 1
        if self._look() is None:
            self._bell.sleep(SLEEP_S)
        self._words[self._own_word + _SLEEPS] = 0

    def _look(self) -> tuple[bytes, bool] | None:
        """The next piece and whether its message ends with it, if it is there as a whole."""
        words, at = self._words, self.slot_word(self._number)
        sequence = (self._number + 1) & _MASK
        if words[at + _SEQUENCE] != sequence or words[at + _LENGTH] > self._slot_bytes:
            return None
        piece = bytes(self.payload(at, words[at + _LENGTH]))
        is_last = bool(words[at + _IS_LAST])
        if words[at + _CHECKSUM] != _checksum(piece, sequence, is_last):
            return None
        return piece, is_last


def _checksum(piece: bytes, sequence: int, is_last: bool) -> int:
    return zlib.crc32(piece, zlib.crc32(b"%d %d" % (sequence, is_last)))
