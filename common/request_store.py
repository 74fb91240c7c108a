"""Requests by their id: what is known of one, who watches it, and the end of those that nobody watches.

The queue moves requests; this file answers questions about them. A gateway that holds a stream refreshes its entry in
the request's set of watchers; the set expires when every gateway that did so is gone.
"""

from collections.abc import AsyncIterator, Container, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from common.codec import decode, decode_frame
from common.lua import Scripts
from common.messages import (
    TERMINAL_STATES,
    Failure,
    Finish,
    Frame,
    GenerationRequest,
    RequestState,
)
from common.redis_keys import ModelKeys
from common.request_queue import CANCELLED_FRAME, DONE_TTL_MS, WATCH_TTL_S

_ENTRIES_PER_LOOK = 256


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """What is known of a request. Times are Unix seconds by the broker's clock."""

    request: GenerationRequest
    state: RequestState
    attempts: int
    created_at: float
    deadline_at: float
    num_tokens: int
    num_frames: int
    finish: Finish | None
    failure: Failure | None

    @property
    def has_ended(self) -> bool:
        return self.state in TERMINAL_STATES


@dataclass(frozen=True, slots=True)
class Orphans:
    """What a look found: ids that nobody watches, and how many were ended because that was so before."""

    unwatched: frozenset[str]
    num_ended: int


class RequestStore:
    """The requests of one model."""

    def __init__(self, redis: Redis, keys: ModelKeys, *, scripts: Scripts | None = None) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts or Scripts(redis)

    async def find(self, request_id: str) -> GenerationRequest | None:
        """The request as it was enqueued, or None when it is unknown or has expired."""
        body = await self._redis.hget(self._keys.request(request_id), "body")
        return decode(GenerationRequest, body) if body else None

    async def status(self, request_id: str) -> RequestStatus | None:
        """State and progress of a request, or None when it is unknown or has expired."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hmget(
                self._keys.request(request_id), "body", "state", "attempts", "created", "deadline"
            )
            pipeline.lrange(self._keys.journal(request_id), 0, -1)
            (body, state, attempts, created, deadline), items = await pipeline.execute()
        if body is None:
            return None
        frames = [decode_frame(item) for item in items]
        last = frames[-1] if frames else Frame()
        return RequestStatus(
            request=decode(GenerationRequest, body),
            state=RequestState(state.decode()),
            attempts=int(attempts),
            created_at=int(created) / 1000,
            deadline_at=int(deadline) / 1000,
            num_tokens=sum(len(frame.tokens) for frame in frames),
            num_frames=len(frames),
            finish=last.finish,
            failure=last.failure,
        )

    async def forget(self, request_id: str) -> bool:
        """Remove an ended request, so that its id can be used again; False when it still waits or runs."""
        names = [self._keys.request(request_id), self._keys.journal(request_id)]
        return bool(await self._scripts.run("forget", names, []))

    async def watch(self, watchers: Sequence[tuple[str, str]]) -> None:
        """Note for each (request id, watcher) that the watcher reads the stream, for `WATCH_TTL_S` from now on.

        Raises Unavailable.
        """
        ttl_ms = int(WATCH_TTL_S * 1000)
        for start in range(0, len(watchers), _ENTRIES_PER_LOOK):
            rows = watchers[start : start + _ENTRIES_PER_LOOK]
            keys = [self._keys.watchers(request_id) for request_id, _ in rows]
            await self._scripts.run("watch", keys, [ttl_ms, *(watcher for _, watcher in rows)])

    async def unwatch(self, request_id: str, watcher: str) -> int:
        """Take a watcher back; the number of those that are left. Raises Unavailable.

        One script, because many may leave at once: a pipeline takes a connection of its own.
        """
        return await self._scripts.run("unwatch", [self._keys.watchers(request_id)], [watcher])

    async def look_for_orphans(
        self, *, patience_s: float = WATCH_TTL_S, seen: Container[str] = ()
    ) -> "Orphans":
        """Find what nobody watches, waiting or running, and end those of it that are in `seen` already.

        Requests younger than `patience_s`, and those that shall run unwatched, are left alone.
        """
        unwatched: set[str] = set()
        num_ended = 0
        for queue in self._keys.queues:
            async for request_ids in self._ids_in(queue):
                calls = [
                    self._orphan_call(request_id, patience_s, request_id in seen)
                    for request_id in request_ids
                ]
                replies = await self._scripts.run_all("cancel_orphan", calls)
                num_ended += replies.count(2)
                found = zip(request_ids, replies, strict=True)
                unwatched |= {request_id for request_id, reply in found if reply == 1}
        return Orphans(frozenset(unwatched), num_ended)

    async def _ids_in(self, queue: str) -> AsyncIterator[list[str]]:
        """The requests behind a queue's entries, leased or not, some at a time."""
        after = "-"
        while rows := await self._redis.xrange(queue, min=after, count=_ENTRIES_PER_LOOK):
            yield [fields[b"id"].decode() for _, fields in rows]
            after = f"({rows[-1][0].decode()}"

    def _orphan_call(
        self, request_id: str, patience_s: float, was_seen: bool
    ) -> tuple[list[str], list[Any]]:
        keys = self._keys
        names = [keys.request(request_id), keys.watchers(request_id)]
        names += [keys.journal(request_id), keys.channel(request_id)]
        return names, [int(patience_s * 1000), int(was_seen), DONE_TTL_MS, CANCELLED_FRAME]
