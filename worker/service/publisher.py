"""Writes what was generated to the journals, one atomic call a step, while the engine runs the next step.

It keeps the frames of live requests: a broker that lost its tail is given them again. What Redis refuses (somebody else
holds the request, or its client cancelled) comes back from `take_lost`, so that the scheduler can drop it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from common.errors import DeadlineExceeded, FleetError, Unavailable
from common.messages import Failure, Frame
from common.request_queue import Append, Appended, Lease, RequestQueue
from worker.engine.sequence import Sequence
from worker.service.output import Output

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0
_RELEASE_S = 1.0  # for the frames that are under way when a worker stops


@dataclass(slots=True)
class _Stream:
    """A live request: its frames from the first on, and how many the journal is known to hold."""

    sequence: Sequence
    lease: Lease
    ends_at_s: float
    frames: list[Frame] = field(default_factory=list)
    num_sent: int = 0

    @property
    def next_append(self) -> Append:
        frame = self.frames[self.num_sent] if self.num_sent < len(self.frames) else None
        lease = self.lease
        return Append(lease.request.id, lease.token, lease.queue, self.num_sent, frame)


class Publisher:
    """The writing end of the journals of one worker's requests."""

    def __init__(
        self,
        queue: RequestQueue,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[Sequence, Frame], None] = lambda sequence, frame: None,
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._on_end = on_end
        self._streams: dict[str, _Stream] = {}
        self._lost: list[Sequence] = []
        self._overtaken: list[Lease] = []
        self._sending: asyncio.Task[None] | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    @property
    def num_live(self) -> int:
        return len(self._streams)

    @property
    def num_untried(self) -> int:
        """Live requests that told nothing since their lease: against those the end of this worker would count."""
        return sum(stream.num_sent <= len(stream.lease.frames) for stream in self._streams.values())

    @property
    def has_unsent(self) -> bool:
        """Whether a frame is not yet known to be in its journal."""
        return any(stream.num_sent < len(stream.frames) for stream in self._streams.values())

    @property
    def entries(self) -> set[tuple[str, str]]:
        """Queue and entry of every live request."""
        return {(stream.lease.queue, stream.lease.entry) for stream in self._streams.values()}

    def open(self, sequence: Sequence, lease: Lease) -> None:
        """Begin to publish a leased request; one that was lost meanwhile and came back begins anew."""
        if (known := self._streams.get(lease.request.id)) is not None:
            self._lost.append(known.sequence)
        frames = list(lease.frames)
        ends_at_s = self._clock() + lease.left_s
        stream = _Stream(sequence, lease, ends_at_s, frames, len(frames))
        self._streams[lease.request.id] = stream

    async def publish(self, outputs: Iterable[Output]) -> None:
        """Begin to send a step's frames, once those of the step before are sent.

        Where one of them is a request's first they are on their way when this returns, before the next step begins:
        somebody waits for it, and only for it.
        """
        await self.flush()
        is_awaited = False
        for output in outputs:
            stream = self._streams.get(output.sequence.request.id)
            if stream is not None and stream.sequence is output.sequence:
                is_awaited |= not stream.frames
                stream.frames.append(output.frame)
        self._expire()
        if self._streams:
            self._sending = asyncio.create_task(self._send(), name="publish")
        if is_awaited:
            await asyncio.sleep(0)

    async def flush(self) -> None:
        """Return when everything given so far is in the journals."""
        if self._sending is not None:
            await self._sending
            self._sending = None

    def take_lost(self) -> list[Sequence]:
        """Sequences that this worker must not go on with, each once."""
        lost, self._lost = self._lost, []
        return lost

    def take_overtaken(self) -> list[Lease]:
        """Leases to begin anew from the journal, which holds other frames than this worker made."""
        overtaken, self._overtaken = self._overtaken, []
        return overtaken

    def fail(self, sequence: Sequence, error: FleetError) -> None:
        """End a request with an error; sent with the next step."""
        stream = self._streams.get(sequence.request.id)
        if stream is not None and not (stream.frames and stream.frames[-1].is_terminal):
            stream.frames.append(Frame(failure=Failure(error.kind, str(error))))
            self._lost.append(sequence)

    async def release_all(self) -> int:
        """Hand every live request back to the queue; the number that another worker can go on with.

        A broker that does not answer in time will see the lease end instead.
        """
        if self._sending is not None:  # whatever of it arrives later is refused: the lease is over
            await asyncio.wait([self._sending], timeout=_RELEASE_S)
            self._sending.cancel()
        streams, self._streams = list(self._streams.values()), {}
        return sum(await asyncio.gather(*map(self._release, streams)))

    async def _release(self, stream: _Stream) -> bool:
        lease = stream.lease
        try:
            return await self._queue.release(lease.token, lease.queue, lease.request.id)
        except Unavailable as error:
            logger.warning("a request was not handed back: %s", error)
            return False

    def _expire(self) -> None:
        now = self._clock()
        for stream in self._streams.values():
            if now > stream.ends_at_s:
                self.fail(stream.sequence, DeadlineExceeded())

    async def _send(self) -> None:
        """Send one frame of every stream, then go on with the streams that have more (after a lost tail).

        The youngest come first, in the broker and so on the way to their clients: who waits for a first token feels a
        millisecond, who reads the others gets each in its turn anyway.
        """
        streams = list(reversed(self._streams.values()))
        while streams:
            appends = [stream.next_append for stream in streams]
            replies = await self._append(appends)
            for stream, append, reply in zip(streams, appends, replies, strict=True):
                self._settle(stream, append, reply)
            streams = [
                stream
                for stream in streams
                if stream.num_sent < len(stream.frames) and self._is_live(stream)
            ]

    async def _append(self, appends: list[Append]) -> list[Appended]:
        while True:
            try:
                return await self._queue.append(appends, patience_s=_PATIENCE_S)
            except Unavailable as error:
                # nothing can be published, so nothing more is decoded: publish() waits for this
                logger.warning("the broker does not answer, holding", extra={"error": str(error)})

    def _settle(self, stream: _Stream, append: Append, reply: Appended) -> None:
        if reply.is_ok:
            if append.frame is not None:
                stream.num_sent += 1
                if append.frame.is_terminal:
                    self._end(stream, append.frame)
        elif reply.is_fenced or reply.is_cancelled:
            self._end(stream, None)
            self._lost.append(stream.sequence)
        elif reply.resend_from is not None:
            stream.num_sent = reply.resend_from
        else:
            self._adopt(stream, reply.ahead)

    def _adopt(self, stream: _Stream, ahead: tuple[Frame, ...]) -> None:
        """The journal holds more than we knew: our own frames (a lost reply), or others, which then win."""
        own = stream.frames[stream.num_sent : stream.num_sent + len(ahead)]
        if tuple(own) == ahead:
            stream.num_sent += len(ahead)
            if ahead[-1].is_terminal:
                self._end(stream, ahead[-1])
            return
        frames = (*stream.frames[: stream.num_sent], *ahead)
        self._end(stream, None)
        self._lost.append(stream.sequence)
        if not frames[-1].is_terminal:
            left_s = stream.ends_at_s - self._clock()
            self._overtaken.append(replace(stream.lease, frames=frames, left_s=left_s))

    def _end(self, stream: _Stream, frame: Frame | None) -> None:
        if self._is_live(stream):
            del self._streams[stream.lease.request.id]
        if frame is not None:
            self._on_end(stream.sequence, frame)

    def _is_live(self, stream: _Stream) -> bool:
        return self._streams.get(stream.lease.request.id) is stream
