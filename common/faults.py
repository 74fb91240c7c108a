"""Points at which a process can be told to break, for tests that must hit an exact moment. Nothing of it runs unless asked.

    --fault-at lease.after_reply:kill      end as by kill -9 when the point is reached
    --fault-at step.after_reply#5:stop     stop as by SIGSTOP when it is reached for the fifth time

Points: enqueue.before_send, enqueue.after_reply (gateway); lease.before_send, lease.after_reply, resume.after_reply,
step.before_send, step.after_reply, publish.before_terminal, publish.after_terminal, release.before_send (worker).
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from common.messages import GenerationRequest
from common.redis_keys import ModelKeys
from common.request_queue import Append, Appended, Entry, Lease, RequestQueue

POINTS = frozenset(
    {
        "enqueue.before_send",
        "enqueue.after_reply",
        "lease.before_send",
        "lease.after_reply",
        "resume.after_reply",
        "step.before_send",
        "step.after_reply",
        "publish.before_terminal",
        "publish.after_terminal",
        "release.before_send",
    }
)
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class FaultPoint:
    """The one point of this process. Raises ValueError for a text that names none."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"([a-z_.]+)(?:#(\d+))?:(kill|stop)", text)
        if found is None or found[1] not in POINTS:
            raise ValueError(
                f"`fault_at` must be point:kill or point#n:stop, a point of {', '.join(sorted(POINTS))}. "
                f"Given: {text!r}"
            )
        self._name, self._left, self._signal = found[1], int(found[2] or 1), _SIGNALS[found[3]]

    def reach(self, name: str) -> None:
        """Break, if this is the point and its turn."""
        if name != self._name:
            return
        self._left -= 1
        if self._left == 0:
            print(f"fault point {name} reached", file=sys.stderr, flush=True)
            os.kill(os.getpid(), self._signal)


class BreakingQueue(RequestQueue):
    """A queue whose process breaks at a point."""

    def __init__(self, redis: Redis, keys: ModelKeys, point: FaultPoint, **options: Any) -> None:
        super().__init__(redis, keys, **options)
        self._point = point

    async def enqueue(self, request: GenerationRequest, **options: Any) -> bool:
        self._point.reach("enqueue.before_send")
        is_new = await super().enqueue(request, **options)
        self._point.reach("enqueue.after_reply")
        return is_new

    async def lease(self, worker: str, entries: Sequence[Entry]) -> list[Lease]:
        if entries:
            self._point.reach("lease.before_send")
        leases = await super().lease(worker, entries)
        if leases:
            is_resumed = any(lease.frames for lease in leases)
            self._point.reach("resume.after_reply" if is_resumed else "lease.after_reply")
        return leases

    async def append(self, appends: Sequence[Append], *, patience_s: float) -> list[Appended]:
        is_end = any(item.frame and item.frame.is_terminal for item in appends)
        self._point.reach("publish.before_terminal" if is_end else "step.before_send")
        replies = await super().append(appends, patience_s=patience_s)
        self._point.reach("publish.after_terminal" if is_end else "step.after_reply")
        return replies

    async def release(self, lease_token: str, queue: str, request_id: str) -> bool:
        self._point.reach("release.before_send")
        return await super().release(lease_token, queue, request_id)


def open_request_queue(
    redis: Redis, keys: ModelKeys, *, fault_at: str = "", **options: Any
) -> RequestQueue:
    """The queue of a model; one that breaks where `fault_at` says, if it says anything. Raises ValueError."""
    if fault_at:
        return BreakingQueue(redis, keys, FaultPoint(fault_at), **options)
    return RequestQueue(redis, keys, **options)
