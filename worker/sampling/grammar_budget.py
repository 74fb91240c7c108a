"""The processor time that one row's grammar may take: a little for every step, more for a single one.

Time of the thread, not of the clock on the wall: on a busy machine an ordinary grammar's mask comes
late as well. The engine's thread can ask while the step runs, which nobody can interrupt.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

# Ordinary grammars take 1 ms a step, and 3 ms at worst. What a step leaves is saved up, to this much.
STEP_S = 0.01
MOST_S = 0.1


class GrammarBudget:
    """What a row has left. One thread spends it, any may ask."""

    def __init__(self) -> None:
        self._left_s = MOST_S
        self._spent_s: Callable[[], float] = _nothing  # by the step that runs

    @property
    def is_overspent(self) -> bool:
        return self._left_s < self._spent_s()  # read in this order: see the end of a step

    @contextmanager
    def step(self) -> Iterator[None]:
        """What the calling thread does here is the work of one step."""
        clock = _thread_clock()
        began_s = clock()
        self._spent_s = lambda: clock() - began_s
        try:
            yield
        finally:
            left_s = self._left_s + STEP_S - self._spent_s()
            self._spent_s = _nothing  # first, so that nobody sees the time of this step twice
            self._left_s = min(MOST_S, left_s)


def _nothing() -> float:
    return 0.0


def _thread_clock() -> Callable[[], float]:
    """Seconds of processor time of the calling thread, for any thread to read. macOS has no such
    clock: there it is the one on the wall."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    return partial(time.clock_gettime, time.pthread_getcpuclockid(threading.get_ident()))
