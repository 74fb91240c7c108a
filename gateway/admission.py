"""How many requests one process holds open, and who may when there are not enough places for all.

A permit lives as long as its `with` block, so no exit path can keep it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import Overloaded

_WANTS_FOR_S = (
    5.0  # who was refused is thought to come again in this time; Retry-After says after one
)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who asks for places: the name of a key, and how many parts of them it gets."""

    name: str = ""
    weight: int = 1


ANYBODY = Holder()


class Admission:
    """Counts open requests. A request over the limit is refused at once: waiting is the queue's business.

    While places are left, everybody may have them. When somebody was refused who has less than a fair share of them,
    those with more get no new ones. The queue is served in order, so shares of the places are shares of the tokens.
    """

    def __init__(self, *, max_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_requests = max_requests
        self._clock = clock
        self._num_open: Counter[Holder] = Counter()
        self._refused_at: dict[Holder, float] = {}

    @property
    def num_open(self) -> int:
        return self._num_open.total()

    @contextmanager
    def permit(self, num_sequences: int = 1, *, holder: Holder = ANYBODY) -> Iterator[None]:
        """Hold room for `num_sequences` generations. Raises Overloaded."""
        if num_sequences and not self._has_room(holder, num_sequences):
            self._refused_at[holder] = self._clock()
            raise Overloaded(retry_after_s=1)
        self._num_open[holder] += num_sequences
        try:
            yield
        finally:
            self._num_open[holder] -= num_sequences
            if not self._num_open[holder]:
                del self._num_open[holder]

    def _has_room(self, holder: Holder, num_sequences: int) -> bool:
        if self.num_open + num_sequences > self._max_requests:
            return False
        if not self._refused_at:
            return True
        wanting = self._wanting()
        num_parts = sum(one.weight for one in {holder, *self._num_open, *wanting})
        part = self._max_requests / num_parts
        is_short = any(
            self._num_open[other] < int(other.weight * part) for other in wanting - {holder}
        )
        return not is_short or self._num_open[holder] + num_sequences <= holder.weight * part

    def _wanting(self) -> set[Holder]:
        """Who was refused a short time ago."""
        since = self._clock() - _WANTS_FOR_S
        self._refused_at = {one: at for one, at in self._refused_at.items() if at > since}
        return set(self._refused_at)
