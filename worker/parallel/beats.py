"""Signs of life of every shard of a machine, in shared memory. The launcher reads them; the shards
never read each other's.

    shard 0 | state | step | alive at | progress at |         a line of memory each
    shard 1 | state | step | alive at | progress at |

Two clocks, because there are two ways to be stuck. A stopped or swapped-out process does nothing at
all: a thread of its own renews `alive at`. A deadlocked one still has that thread, but its step does
not come from one collective to the next: `progress at`. A long step makes progress all the time.
"""

import threading
import time
from dataclasses import dataclass
from enum import IntEnum

ALIVE_EVERY_S = 0.25

_LINE = 64
_WORDS = _LINE // 8
_STATE, _STEP, _ALIVE, _PROGRESS = range(4)


class ShardState(IntEnum):
    """Where a shard is in its life. While it loads it is not watched: disks may take their time."""

    LOADING = 0
    IDLE = 1
    STEPPING = 2


@dataclass(frozen=True, slots=True)
class ShardHealth:
    """What a shard's line says, as seen now."""

    rank: int  # on this machine
    state: ShardState
    step: int  # the last one that it began
    silent_s: float  # since its process gave a sign of life; 0 while it loads
    stalled_s: float  # since its step made progress; 0 between steps


def board_bytes(num_shards: int) -> int:
    """Memory that the lines of `num_shards` take."""
    return num_shards * _LINE


class BeatBoard:
    """All lines, as the launcher sees them."""

    def __init__(self, memory: memoryview, num_shards: int) -> None:
        self._words = memory[: board_bytes(num_shards)].cast("Q")
        self._times = memory[: board_bytes(num_shards)].cast("d")
        self._num_shards = num_shards

    def read(self) -> list[ShardHealth]:
        """Every shard's health; times are of the monotonic clock, which all processes share."""
        now = time.monotonic()
        return [self._health(rank, now) for rank in range(self._num_shards)]

    def _health(self, rank: int, now: float) -> ShardHealth:
        at = rank * _WORDS
        state = ShardState(self._words[at + _STATE])
        is_loaded, is_stepping = state is not ShardState.LOADING, state is ShardState.STEPPING
        return ShardHealth(
            rank,
            state,
            self._words[at + _STEP],
            silent_s=max(0.0, now - self._times[at + _ALIVE]) if is_loaded else 0.0,
            stalled_s=max(0.0, now - self._times[at + _PROGRESS]) if is_stepping else 0.0,
        )


class Beats:
    """One shard's line, as that shard writes it. `start` makes it watched, `stop` ends that."""

    def __init__(self, memory: memoryview, rank: int) -> None:
        line = memory[rank * _LINE : (rank + 1) * _LINE]
        self._words = line.cast("Q")
        self._times = line.cast("d")
        self._is_stopped = threading.Event()

    def start(self) -> None:
        """The model is loaded: from here on silence is a failure."""
        self._times[_ALIVE] = time.monotonic()
        self._words[_STATE] = ShardState.IDLE
        threading.Thread(target=self._live, name="beats", daemon=True).start()

    def begin(self, step: int) -> None:
        """A step begins."""
        self._words[_STEP] = step
        self.progress()
        self._words[_STATE] = ShardState.STEPPING

    def progress(self) -> None:
        """The step is not stuck: a collective returned."""
        self._times[_PROGRESS] = time.monotonic()

    def end(self) -> None:
        """The step is done."""
        self._words[_STATE] = ShardState.IDLE

    def stop(self) -> None:
        """This shard ends in good order."""
        self._is_stopped.set()
        self._words[_STATE] = ShardState.LOADING

    def _live(self) -> None:
        while not self._is_stopped.wait(ALIVE_EVERY_S):
            self._times[_ALIVE] = time.monotonic()
