"""The use case: queue a request or attach to a known one, follow its journal, and end it when nobody reads it.

The stream is the primitive; an answer in one piece folds it, and `best_of` folds several. Knows no HTTP.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from redis.exceptions import RedisError

from common.errors import (
    FleetError,
    IdempotencyConflict,
    Overloaded,
    Unavailable,
    error_of_kind,
)
from common.lua import TRANSIENT
from common.messages import Finish, Frame, GenerationRequest, OnDisconnect, Token, TopToken
from common.request_queue import RequestQueue
from common.request_store import RequestStore
from common.token_journal import JournalReader, TokenJournal
from gateway.metrics import GatewayMetrics
from gateway.resumption import GRACE_S, EventId
from gateway.watching import Watches

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completion:
    """A generation that ended well, in one piece."""

    request: GenerationRequest
    text: str
    tokens: tuple[Token, ...]
    prompt: tuple[TopToken, ...]
    finish: Finish
    first_token_s: float  # after the enqueueing

    @property
    def mean_logprob(self) -> float:
        """What `best_of` chooses by."""
        return sum(token.logprob for token in self.tokens) / max(1, len(self.tokens))


class FrameStream:
    """The frames of one request as `(index, frame)`; ends after a finish, raises the error that a failure names.

    The first frame is always the journal's first, also for a client that has seen some.
    """

    __slots__ = (
        *("__weakref__", "_gaps", "_last_at", "_metrics", "_reader", "_started_at", "finish"),
        *("first_token_s", "is_attached", "is_ended", "is_held_up", "is_stopped", "num_tokens"),
        *("on_leave", "request"),
    )

    def __init__(
        self, request: GenerationRequest, reader: JournalReader, metrics: GatewayMetrics
    ) -> None:
        self.request = request
        self.on_leave = request.on_disconnect
        self.is_attached = False  # to a generation that somebody else began
        self.is_ended = False
        self.is_stopped = False  # by `stop`, before its end
        self.is_held_up = False  # the broker was away for too long
        self.first_token_s: float | None = None  # after the enqueueing
        self.finish: Finish | None = None
        self.num_tokens = 0
        self._reader = reader
        self._metrics = metrics
        self._gaps = metrics.inter_token_latency.labels(request.model)
        self._started_at = self._last_at = time.perf_counter()

    def attach(self, request: GenerationRequest) -> None:
        """Follow a generation that is known already; its times and tokens are somebody else's to count."""
        self.request, self.is_attached = request, True
        if request.on_disconnect is OnDisconnect.RUN:
            self.on_leave = OnDisconnect.RUN

    async def catch_up(self) -> None:
        """Read what there is already. Raises StreamDiverged and Unavailable."""
        await self._reader.catch_up()

    def call_while_held(self, call: Callable[[], Awaitable[None]]) -> None:
        """Await `call` now and then while the broker does not answer."""
        self._reader.on_hold = call

    def stop(self) -> None:
        """End the iteration after the frame that was given last."""
        self.is_stopped = True
        self._reader.stop()

    def __aiter__(self) -> "FrameStream":
        return self

    async def __anext__(self) -> tuple[int, Frame]:
        if self.is_ended:
            raise StopAsyncIteration
        try:
            item = await self._reader.__anext__()
        except Unavailable:
            self.is_held_up = True
            raise
        self._note(item[1])
        return item

    def listen(self, sink: Callable[[], None]) -> None:
        """Call `sink` when frames come while the iteration waits: those it takes by `ready` cost no task switch."""
        self._reader.listen(sink)

    def ready(self) -> list[tuple[int, Frame]]:
        """The frames that are here already. Sent together, they cost the less the further this gateway is behind."""
        items = self._reader.take_ready()
        for _, frame in items:
            self._note(frame)
        return items

    def _note(self, frame: Frame) -> None:
        """Count and time a frame. Raises the error that a failure names."""
        now = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = now - self._started_at
            if not self.is_attached:
                labelled = self._metrics.time_to_first_token.labels(self.request.model)
                labelled.observe(self.first_token_s)
        elif not self.is_attached:
            self._gaps.observe(now - self._last_at)
        self._last_at = now
        self.num_tokens += len(frame.tokens)
        if frame.finish is not None or frame.failure is not None:
            self._end(frame)

    def _end(self, frame: Frame) -> None:
        self.is_ended, self.finish = True, frame.finish
        if frame.failure is not None:
            raise error_of_kind(frame.failure.kind, frame.failure.message)
        if not self.is_attached:
            self._metrics.observe_finish(self.request, frame.finish)


class Generator:
    """Runs requests on the fleet. The `open_...` functions give the ends of the protocol for a model's name."""

    def __init__(
        self,
        *,
        open_queue: Callable[[str], RequestQueue],
        open_journal: Callable[[str], TokenJournal],
        open_store: Callable[[str], RequestStore],
        watches: Watches,
        metrics: GatewayMetrics,
        max_waiting: int,
        grace_s: float = GRACE_S,
    ) -> None:
        self._open_queue = open_queue
        self._open_journal = open_journal
        self._open_store = open_store
        self._watches = watches
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._grace_s = grace_s
        self._streams: set[FrameStream] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_closing = asyncio.Event()

    @asynccontextmanager
    async def stream(
        self, request: GenerationRequest, *, last_event: EventId | None = None
    ) -> AsyncIterator[FrameStream]:
        """Queue `request`, or attach to the one that has its id, and give the frames.

        Leaving before their end does what `on_disconnect` says, unless somebody else reads the same request.

        Raises Overloaded when the queue is full, Unavailable without a broker, IdempotencyConflict when the id
        stands for another request, and StreamDiverged when the journal does not hold `last_event`.
        """
        async with self._follow(request, last_event, is_known=False) as frames:
            yield frames

    @asynccontextmanager
    async def attach(
        self, request: GenerationRequest, *, last_event: EventId | None = None
    ) -> AsyncIterator[FrameStream]:
        """The frames of a request that was queued before. Raises Unavailable and StreamDiverged."""
        patient = replace(request, on_disconnect=at_least_grace(request.on_disconnect))
        async with self._follow(patient, last_event, is_known=True) as frames:
            yield frames

    async def complete(
        self, request: GenerationRequest, *, keeps_special_tokens: bool = False
    ) -> Completion:
        """The whole answer to `request`; its text has the special tokens only when asked for. Raises FleetError."""
        told: list[Frame] = []
        async with self.stream(request) as frames:
            frames.listen(lambda: told.extend(frame for _, frame in frames.ready()))
            async for _, frame in frames:
                told.append(frame)
        tokens = [token for frame in told for token in frame.tokens]
        prompt = next((frame.prompt for frame in told if frame.prompt), ())
        if frames.finish is None:
            raise Unavailable("This gateway is stopping; send the request again")
        assert frames.first_token_s is not None
        text = "".join(
            token.text for token in tokens if keeps_special_tokens or not token.is_special
        )
        return Completion(
            frames.request, text, tuple(tokens), prompt, frames.finish, frames.first_token_s
        )

    async def complete_all(
        self, requests: tuple[GenerationRequest, ...], *, keeps_special_tokens: bool = False
    ) -> list[Completion]:
        """Whole answers, the most likely first. One failure fails all, and cancels the others."""
        answers = await self.complete_each(requests, keeps_special_tokens=keeps_special_tokens)
        return sorted(answers, key=lambda answer: answer.mean_logprob, reverse=True)

    async def complete_each(
        self, requests: tuple[GenerationRequest, ...], *, keeps_special_tokens: bool = False
    ) -> list[Completion]:
        """Whole answers, in the order of the requests. One failure fails all, and cancels the others."""
        complete = partial(self.complete, keeps_special_tokens=keeps_special_tokens)
        if len(requests) == 1:
            return [await complete(requests[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(complete(request)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def cancel(self, request: GenerationRequest) -> bool:
        """Ask for the end of a request; False when it has ended already. Raises Unavailable."""
        try:
            return await self._open_queue(request.model).cancel(request.id)
        except RedisError as error:
            raise Unavailable(f"the broker refused to cancel: {error}") from error

    def stop_streams(self) -> None:
        """End every open stream after the frame that it gave last."""
        for frames in list(self._streams):
            frames.stop()

    async def close(self) -> None:
        """Wait for the cancellations that are under way; those in their grace are left to the workers."""
        self._is_closing.set()
        await asyncio.gather(*self._leaving)

    @asynccontextmanager
    async def _follow(
        self, request: GenerationRequest, last_event: EventId | None, *, is_known: bool
    ) -> AsyncIterator[FrameStream]:
        journal, opened_at = self._open_journal(request.model), time.monotonic()

        async def restore(relayed: Sequence[bytes]) -> bool:
            left_s = max(1.0, frames.request.deadline_s - (time.monotonic() - opened_at))
            lost = replace(frames.request, deadline_s=left_s)
            self._metrics.restored.labels(lost.model).inc()
            return await self._open_queue(request.model).restore(lost, relayed)

        expects = (last_event.index, last_event.chain) if last_event else None
        async with journal.open(request.id, expects=expects, restore=restore) as reader:
            frames = FrameStream(request, reader, self._metrics)
            watcher = self._watches.add(request.model, request.id, is_noted=not is_known)
            try:
                if is_known:
                    frames.attach(request)
                elif await self._enqueue(request, watcher):
                    reader.nothing_missed()
                else:
                    frames.attach(await self._known(request))
                if last_event:
                    await frames.catch_up()
                self._streams.add(frames)
                with self._metrics.open_requests.track_inprogress():
                    yield frames
            except (Overloaded, IdempotencyConflict):
                frames.is_ended = True  # nothing of ours was queued
                raise
            finally:
                self._streams.discard(frames)
                self._leave(frames, watcher)

    async def _enqueue(self, request: GenerationRequest, watcher: str) -> bool:
        queue = self._open_queue(request.model)
        try:
            return await queue.enqueue(request, max_waiting=self._max_waiting, watcher=watcher)
        except (
            RedisError
        ) as error:  # the broker answered, but will not take it: out of memory, read-only
            raise Unavailable(f"the broker refused the request: {error}") from error

    async def _known(self, request: GenerationRequest) -> GenerationRequest:
        """The request that was queued under this id. Raises IdempotencyConflict when it is another one."""
        try:
            known = await self._open_store(request.model).find(request.id)
        except (*TRANSIENT, RedisError) as error:
            raise Unavailable(f"the broker does not answer: {error}") from error
        if known is None:
            raise Unavailable("The request ended long ago; send it again")
        if known.fingerprint != request.fingerprint:
            raise IdempotencyConflict()
        return known

    def _leave(self, frames: FrameStream, watcher: str) -> None:
        """Decide what becomes of a request that this reader leaves."""
        is_over = frames.is_ended or frames.on_leave is OnDisconnect.RUN
        may_come_back = frames.is_stopped and frames.on_leave is OnDisconnect.GRACE
        if is_over or may_come_back or frames.is_held_up:
            self._watches.abandon(watcher)
            return
        # in a task of its own: the task of the request may be ending because it was cancelled itself
        task = asyncio.create_task(self._end(frames, watcher), name=f"leave-{frames.request.id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _end(self, frames: FrameStream, watcher: str) -> None:
        """Cancel a request unless somebody else reads it, or does so after the grace."""
        if frames.on_leave is OnDisconnect.GRACE and await self._is_closing_within(self._grace_s):
            self._watches.abandon(watcher)
            return
        try:
            if not await self._watches.release(watcher):
                await self.cancel(frames.request)
        except (FleetError, RedisError, OSError, TimeoutError) as error:
            logger.warning(
                "could not cancel a request, workers end it once nobody watches it: %s",
                error,
                extra={"request_id": frames.request.id, "model": frames.request.model},
            )

    async def _is_closing_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._is_closing.wait()
        except TimeoutError:
            return False
        return True


def at_least_grace(policy: OnDisconnect) -> OnDisconnect:
    """Who attaches to a request may come back, also to one whose first client wanted it cancelled."""
    return OnDisconnect.GRACE if policy is OnDisconnect.CANCEL else policy
