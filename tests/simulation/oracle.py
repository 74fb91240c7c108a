"""What the scripts in `common/scripts/` mean, in plain Python: the state of requests, leases and journals.

No Redis, no clock: times are the caller's. The state machine in `test_script_transitions.py` compares every reply.
"""

from dataclasses import dataclass, field

MAX_STALLED = 3
MAX_ATTEMPTS = 20
ENDED = ("finished", "failed", "cancelled")


@dataclass(slots=True)
class OracleRequest:
    """A request hash and its journal."""

    id: str
    priority: int
    state: str = "queued"
    token: str = ""
    final_token: str = ""
    revoked: str = ""  # the token that lost it last
    owner: str = ""
    is_cancelled: bool = False
    attempts: int = 0
    stalled: int = 0
    leased_at_length: int = 0
    entry: int = 0  # which of its entries is the valid one
    journal: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class OracleEntry:
    """An item of a queue stream."""

    request_id: str
    number: int
    consumer: str | None = None  # None: not delivered yet


class Oracle:
    """All requests of a model. Every method gives what the script gives."""

    def __init__(self, num_queues: int) -> None:
        self.requests: dict[str, OracleRequest] = {}
        self.queues: list[list[OracleEntry]] = [[] for _ in range(num_queues)]  # 0 is resume
        self.dead_letters: list[str] = []
        self.alive: set[str] = set()
        self._num_entries = 0

    @property
    def num_waiting(self) -> int:
        return sum(entry.consumer is None for queue in self.queues for entry in queue)

    def enqueue(self, request_id: str, priority: int, max_waiting: int) -> str:
        if request_id in self.requests:
            return "DUPLICATE"
        if self.num_waiting >= max_waiting:
            return "FULL"
        request = self.requests[request_id] = OracleRequest(request_id, priority)
        self._put(request, 1 + priority)
        return "OK"

    def fetch(self, worker: str, count: int) -> list[str]:
        found = []
        for queue in self.queues:
            for entry in queue:
                if entry.consumer is None and len(found) < count:
                    entry.consumer = worker
                    found.append(entry.request_id)
        return found

    def lease(self, worker: str, queue: int, entry: OracleEntry, token: str, frames: dict) -> str:
        """`frames`: what the script writes for "cancelled" and "poison"."""
        request = self.requests.get(entry.request_id)
        if request is None or request.entry != entry.number or request.state in ENDED:
            self.queues[queue].remove(entry)
            return "GONE"
        if request.state == "running" and request.owner != worker:
            return "HELD"
        if request.is_cancelled:
            self._end(request, "cancelled", frames["cancelled"], queue, entry)
            return "CANCELLED"
        has_told = len(request.journal) > request.leased_at_length
        is_again = request.owner == worker
        stalled = 0 if has_told else request.stalled
        stalled += has_told or not is_again
        if stalled > MAX_STALLED or request.attempts + 1 > MAX_ATTEMPTS:
            self.dead_letters.append(request.id)
            self._end(request, "failed", frames["poison"], queue, entry)
            return "DEAD"
        request.state, request.token, request.owner = "running", token, worker
        request.stalled, request.leased_at_length = stalled, len(request.journal)
        request.attempts += 1
        if is_again:
            request.revoked = ""
        return "OK"

    def step(
        self, request_id: str, token: str, base: int, kind: str, frame: bytes, cancelled: bytes
    ):
        """The reply of STEP for one request: an int, or the list of frames from `base` on."""
        request = self.requests.get(request_id)
        length = len(request.journal) if request else 0
        if request is None or request.token != token:
            if request and request.revoked == token:
                request.revoked = ""
                request.stalled = max(request.stalled - 1, 0)
                request.attempts = max(request.attempts - 1, 0)
            is_end = kind in ("finished", "failed") and length == base + 1
            return length if is_end and request and request.final_token == token else -1
        if length > base:
            return request.journal[base:]
        if length < base:
            return -1_000_000 - length
        if request.is_cancelled:
            kind, frame = "cancelled", cancelled
        elif kind == "touch":
            return length
        request.journal.append(frame)
        if kind != "append":
            request.state, request.token, request.final_token = kind, "", token
            self._forget_entry(request)
        return -2 if kind == "cancelled" else length + 1

    def cancel(self, request_id: str, frame: bytes) -> bool:
        request = self.requests.get(request_id)
        if request is None or request.state in ENDED:
            return False
        request.is_cancelled = True
        if request.state == "queued":
            request.journal.append(frame)
            request.state = "cancelled"
        return True

    def release(self, request_id: str, token: str) -> bool:
        request = self.requests.get(request_id)
        if request is None or not token or request.token != token:
            return False
        self._forget_entry(request)
        request.state, request.token, request.owner = "queued", "", ""
        request.stalled, request.attempts = (
            max(request.stalled - 1, 0),
            max(request.attempts - 1, 0),
        )
        self._put(request, 0)
        return True

    def reap(self) -> int:
        """Revoke whatever workers without a heartbeat hold."""
        num_revoked = 0
        for queue in self.queues:
            for entry in list(queue):
                if entry.consumer is None or entry.consumer in self.alive:
                    continue
                queue.remove(entry)
                request = self.requests.get(entry.request_id)
                if request and request.entry == entry.number and request.state not in ENDED:
                    request.revoked = request.token
                    request.state, request.token = "queued", ""
                    self._put(request, 0)
                    num_revoked += 1
        return num_revoked

    def lose_tail(self, request_id: str) -> None:
        """The last frame of a journal is gone."""
        if self.requests[request_id].journal:
            self.requests[request_id].journal.pop()

    def _put(self, request: OracleRequest, queue: int) -> None:
        self._num_entries += 1
        request.entry = self._num_entries
        self.queues[queue].append(OracleEntry(request.id, self._num_entries))

    def _end(self, request, state: str, frame: bytes, queue: int, entry: OracleEntry) -> None:
        request.journal.append(frame)
        request.state, request.token = state, ""
        self.queues[queue].remove(entry)

    def _forget_entry(self, request: OracleRequest) -> None:
        for queue in self.queues:
            queue[:] = [entry for entry in queue if entry.number != request.entry]
