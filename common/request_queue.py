"""Both ends of the request queue: a gateway enqueues and cancels, a worker fetches, leases, appends and gives back.

The states of a request and who may move it are in `common/scripts/`; this file only calls them.
"""

import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common.codec import decode, decode_frame, encode, encode_frame
from common.errors import Cancelled, DeadlineExceeded, GenerationFailed, Overloaded
from common.lua import Scripts
from common.messages import Failure, Frame, GenerationRequest
from common.redis_client import BLOCK_MS
from common.redis_keys import GROUP, ModelKeys

WATCH_TTL_S = 60.0  # of a reader of a stream, unless it says again that it reads
DONE_TTL_MS = 600_000  # how long a finished stream can still be read
MAX_STALLED = 3  # leases in a row without a token before a request counts as poison
MAX_ATTEMPTS = 20
NO_LIMIT = 1 << 31  # for requests that were admitted before
_PENDING_PER_LOOK = 1000


def _terminal(error: Exception, kind: str) -> bytes:
    return encode_frame(Frame(failure=Failure(kind, str(error))))


CANCELLED_FRAME = _terminal(Cancelled(), Cancelled.kind)
DEADLINE_FRAME = _terminal(DeadlineExceeded(), DeadlineExceeded.kind)
POISON_FRAME = _terminal(
    GenerationFailed("Request failed during generation: it stopped every worker that tried it"),
    GenerationFailed.kind,
)


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Requests of one model by what they wait for."""

    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as an item of a queue stream."""

    queue: str
    id: str
    request_id: str
    is_suspect: bool = False  # its worker died before it told a token: to be tried alone

    @classmethod
    def read(cls, queue: str, entry: bytes, fields: dict[bytes, bytes]) -> "Entry":
        """From an item of the stream."""
        suspicion = fields.get(b"suspect", b"0")
        return cls(queue, entry.decode(), fields[b"id"].decode(), suspicion == b"1")


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to run a request, proved to Redis by `token`."""

    token: str
    queue: str  # the stream that holds the entry
    request: GenerationRequest
    frames: tuple[Frame, ...]  # what earlier holders generated
    waited_s: float
    left_s: float  # until the deadline
    entry: str = ""  # its id in that stream


@dataclass(frozen=True, slots=True)
class Append:
    """One frame for one journal. `frame` None only asks whether the lease still holds."""

    request_id: str
    token: str
    queue: str
    base: int  # the frame's index: the journal must be exactly this long
    frame: Frame | None


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of an Append: exactly one of the fields says so."""

    is_ok: bool = False
    is_fenced: bool = False
    is_cancelled: bool = False
    resend_from: int | None = None  # the journal lost its tail
    ahead: tuple[Frame, ...] = field(default=())  # the journal already holds these from `base` on


class RequestQueue:
    """The queue of one model."""

    def __init__(self, redis: Redis, keys: ModelKeys, *, scripts: Scripts | None = None) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts or Scripts(redis)

    # The gateway's end

    async def enqueue(
        self,
        request: GenerationRequest,
        *,
        max_waiting: int,
        at_front: bool = False,
        watcher: str = "",
    ) -> bool:
        """Put a request on its queue, or before all others; False when its id is already known.

        Either way `watcher` reads its stream, for `WATCH_TTL_S` from now on (see request_store.py).

        Raises Overloaded when `max_waiting` requests wait, Unavailable without a broker.
        """
        keys = self._keys
        queue = keys.resume_queue if at_front else keys.queue(request.priority)
        reply = await self._scripts.run(
            "enqueue",
            [keys.request(request.id), queue, keys.watchers(request.id), *keys.queues],
            [
                request.id,
                encode(request),
                GROUP,
                max_waiting,
                int(request.deadline_s * 1000),
                DONE_TTL_MS,
                len(request.prompt_tokens),
                request.stopping.max_new_tokens,
                request.tenant,
                request.on_disconnect.value,
                watcher,
                int(WATCH_TTL_S * 1000),
            ],
        )
        if reply[0] == b"FULL":
            raise Overloaded(retry_after_s=await self._retry_after_s(reply[1]))
        return reply[0] == b"OK"

    async def restore(self, request: GenerationRequest, frames: Sequence[bytes]) -> bool:
        """Put back a request that the broker lost, or the tail of its journal: `frames` as read from there before.

        False when the broker holds another continuation than these frames. Raises Unavailable without a broker.
        """
        keys, keep_ms = self._keys, int(request.deadline_s * 1000) + DONE_TTL_MS
        names = [keys.request(request.id), keys.journal(request.id), keys.channel(request.id)]
        if frames and await self._scripts.run("reseed", names, [keep_ms, *frames]) < 0:
            return False
        # after the frames: whoever leases the request must find them. It was admitted once, so no limit holds
        await self.enqueue(request, max_waiting=NO_LIMIT, at_front=True)
        return True

    async def cancel(self, request_id: str) -> bool:
        """Ask for the end of a request; False when it has ended already or is unknown."""
        keys = self._keys
        names = [keys.request(request_id), keys.journal(request_id), keys.channel(request_id)]
        return bool(await self._scripts.run("cancel", names, [DONE_TTL_MS, CANCELLED_FRAME]))

    async def depth(self) -> QueueDepth:
        """How many requests wait and run. Exact, because only delivered entries are ever deleted."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for queue in self._keys.queues:
                pipeline.xlen(queue)
                pipeline.xpending(queue, GROUP)
            replies = await pipeline.execute(raise_on_error=False)
        lengths, pendings = replies[0::2], replies[1::2]
        running = sum(_num_pending(pending) for pending in pendings)
        return QueueDepth(waiting=sum(lengths) - running, running=running)

    # The worker's end

    async def create_group(self) -> None:
        """Make the consumer group of every queue stream; harmless when it exists."""
        for queue in self._keys.queues:
            try:
                await self._redis.xgroup_create(queue, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def wait(self, worker: str) -> list[Entry]:
        """Wait up to a second for the next entry; at most one of each queue."""
        streams = dict.fromkeys(self._keys.queues, ">")
        reply = await self._redis.xreadgroup(GROUP, worker, streams, count=1, block=BLOCK_MS)
        return [
            Entry.read(queue.decode(), entry, fields)
            for queue, items in reply or ()
            for entry, fields in items
        ]

    async def fetch(self, worker: str, *, count: int) -> list[Entry]:
        """Up to `count` waiting entries at once, highest priority first."""
        queues = self._keys.queues
        found = await self._scripts.run("fetch", queues, [GROUP, worker, count])
        return [
            Entry.read(queues[number - 1], entry, dict(zip(row[::2], row[1::2], strict=True)))
            for number, entry, row in found
        ]

    async def delivered(self, worker: str, *, known: Container[tuple[str, str]]) -> list[Entry]:
        """Entries that were delivered to this worker, less the (queue, entry id) that it knows of.

        There are such when the reply that delivered them, or that of their lease, was lost.
        """
        queues = self._keys.queues
        async with self._redis.pipeline(transaction=False) as pipeline:
            for queue in queues:
                pipeline.xpending_range(queue, GROUP, "-", "+", _PENDING_PER_LOOK, worker)
            pendings = await pipeline.execute()
        places = [
            (queue, item["message_id"].decode())
            for queue, pending in zip(queues, pendings, strict=True)
            for item in pending
        ]
        unknown = [place for place in places if place not in known]
        if not unknown:
            return []
        async with self._redis.pipeline(transaction=False) as pipeline:
            for queue, entry in unknown:
                pipeline.xrange(queue, entry, entry)
            rows = await pipeline.execute()
        # an entry that was deleted meanwhile has no request: LEASE finds it gone and forgets it
        return [
            Entry.read(queue, entry.encode(), found[0][1] if found else {b"id": b""})
            for (queue, entry), found in zip(unknown, rows, strict=True)
        ]

    async def broker_run(self) -> str:
        """Names the run of the broker: another one after each restart."""
        return str((await self._redis.info("server"))["run_id"])

    async def lease(self, worker: str, entries: Sequence[Entry]) -> list[Lease]:
        """Take the requests behind delivered entries; those that are not to be run any more are left out."""
        if not entries:
            return []
        tokens = [f"{worker}:{uuid.uuid4().hex}" for _ in entries]
        calls = [
            self._lease_call(worker, entry, token)
            for entry, token in zip(entries, tokens, strict=True)
        ]
        replies = await self._scripts.run_all("lease", calls)
        return [
            _lease(token, entry, reply)
            for token, entry, reply in zip(tokens, entries, replies, strict=True)
            if reply[0] == b"OK"
        ]

    def _lease_call(self, worker: str, entry: Entry, token: str) -> tuple[list[str], list[Any]]:
        keys, rid = self._keys, entry.request_id
        names = [keys.request(rid), keys.journal(rid), entry.queue]
        names += [keys.dead_letters, keys.channel(rid)]
        limits = [MAX_STALLED, MAX_ATTEMPTS, DONE_TTL_MS, rid]
        frames = [CANCELLED_FRAME, DEADLINE_FRAME, POISON_FRAME]
        return names, [token, worker, entry.id, GROUP, *limits, *frames]

    async def append(self, appends: Sequence[Append], *, patience_s: float) -> list[Appended]:
        """Append one frame to each journal and publish it, in one atomic call.

        Raises Unavailable when the broker could not be reached for `patience_s`; calling again is safe.
        """
        names: list[str] = []
        args: list[str | int | bytes] = [GROUP, DONE_TTL_MS, CANCELLED_FRAME]
        keys = self._keys
        for item in appends:
            rid = item.request_id
            names += (keys.request(rid), keys.journal(rid), item.queue, keys.channel(rid))
            args += (item.token, item.base, _kind(item.frame))
            args.append(encode_frame(item.frame) if item.frame else b"")
        replies = await self._scripts.run("step", names, args, patience_s=patience_s)
        return [_appended(reply) for reply in replies]

    async def release(self, lease_token: str, queue: str, request_id: str) -> bool:
        """Hand a request back so that another worker goes on with it; False when it is not held any more."""
        keys = self._keys
        names = [keys.request(request_id), queue, keys.resume_queue]
        return bool(await self._scripts.run("release", names, [lease_token, GROUP, request_id]))

    async def revoke_abandoned(self) -> int:
        """Requeue what workers without a heartbeat hold; the number of requests put back.

        It asks who holds anything, then who of those lives, and only then what the dead ones hold.
        """
        num_revoked = 0
        async with self._redis.pipeline(transaction=False) as pipeline:
            for queue in self._keys.queues:
                pipeline.xpending(queue, GROUP)
            summaries = await pipeline.execute()
        for queue, summary in zip(self._keys.queues, summaries, strict=True):
            for owner in await self._dead([row["name"] for row in summary["consumers"]]):
                pending = await self._redis.xpending_range(
                    queue, GROUP, "-", "+", _PENDING_PER_LOOK, owner
                )
                for item in pending:
                    num_revoked += await self._revoke(queue, item["message_id"], owner)
        return num_revoked

    async def _dead(self, workers: Sequence[bytes]) -> list[bytes]:
        """Those without a heartbeat, or with one that the clock made too long; REVOKE looks again."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for worker in workers:
                pipeline.pttl(self._keys.heartbeat(worker.decode()))
                pipeline.get(self._keys.heartbeat(worker.decode()))
            replies = await pipeline.execute()
        beats = zip(workers, replies[0::2], replies[1::2], strict=True)
        return [worker for worker, left, lease in beats if not 0 < left <= int(lease or 0)]

    async def _revoke(self, queue: str, entry: bytes, owner: bytes) -> int:
        keys = self._keys
        found = await self._redis.xrange(queue, min=entry, max=entry)
        request_id = found[0][1][b"id"].decode() if found else ""
        names = [keys.request(request_id), queue, keys.resume_queue]
        names += [keys.heartbeat(owner.decode()), keys.journal(request_id)]
        reply = await self._scripts.run("revoke", names, [entry, owner, GROUP, request_id])
        return int(reply == 1)

    async def _retry_after_s(self, waiting: int) -> int:
        """A guess at when room will be: a second for every request that runs now and is followed by a waiting one."""
        running = (await self.depth()).running
        return max(1, min(60, round(waiting / max(running, 1))))


def _lease(token: str, entry: Entry, reply: list[Any]) -> Lease:
    _, body, frames, waited_ms, left_ms = reply
    return Lease(
        token,
        entry.queue,
        decode(GenerationRequest, body),
        tuple(decode_frame(frame) for frame in frames),
        waited_ms / 1000,
        left_ms / 1000,
        entry.id,
    )


def _kind(frame: Frame | None) -> str:
    if frame is None:
        return "touch"
    if frame.failure:
        return "failed"
    return "finished" if frame.finish else "append"


def _appended(reply: int | list[bytes]) -> Appended:
    if isinstance(reply, list):
        return Appended(ahead=tuple(decode_frame(frame) for frame in reply))
    if reply >= 0:
        return Appended(is_ok=True)
    if reply == -1:
        return Appended(is_fenced=True)
    return Appended(is_cancelled=True) if reply == -2 else Appended(resend_from=-1_000_000 - reply)


def _num_pending(reply: object) -> int:
    """The count of an XPENDING summary; a queue without a group has none pending."""
    return reply["pending"] if isinstance(reply, dict) else 0
