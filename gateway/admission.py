"""How many requests one process holds open. A permit lives as long as its `with` block, so no exit path can keep it."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Overloaded


class Admission:
    """Counts open requests. A request over the limit is refused at once: waiting is the queue's business."""

    def __init__(self, *, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_open = 0

    @property
    def num_open(self) -> int:
        return self._num_open

    @contextmanager
    def permit(self, num_sequences: int = 1) -> Iterator[None]:
        """Hold room for `num_sequences` generations. Raises Overloaded."""
        if self._num_open + num_sequences > self._max_requests:
            raise Overloaded(retry_after_s=1)
        self._num_open += num_sequences
        try:
            yield
        finally:
            self._num_open -= num_sequences
