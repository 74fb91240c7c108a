"""The use case: queue a request, follow its journal, and cancel it when its client goes away.

The stream is the primitive; an answer in one piece folds it, and `best_of` folds several. Knows no HTTP.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from common.errors import FleetError, Overloaded, error_of_kind
from common.messages import Finish, Frame, GenerationRequest, Token, TopToken
from common.request_queue import RequestQueue
from common.token_journal import JournalReader, TokenJournal
from gateway.metrics import GatewayMetrics

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
    """The frames of one request as `(index, frame)`; ends after a finish, raises the error that a failure names."""

    def __init__(
        self, request: GenerationRequest, reader: JournalReader, metrics: GatewayMetrics
    ) -> None:
        self.is_ended = False
        self.first_token_s: float | None = None  # after the enqueueing
        self.finish: Finish | None = None
        self.num_tokens = 0
        self._request = request
        self._reader = reader
        self._metrics = metrics
        self._observe_gap = metrics.inter_token_latency.labels(request.model).observe
        self._started_at = self._last_at = time.perf_counter()

    def __aiter__(self) -> "FrameStream":
        return self

    async def __anext__(self) -> tuple[int, Frame]:
        if self.is_ended:
            raise StopAsyncIteration
        item = await self._reader.__anext__()
        frame, now = item[1], time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = now - self._started_at
            self._metrics.time_to_first_token.labels(self._request.model).observe(
                self.first_token_s
            )
        else:
            self._observe_gap(now - self._last_at)
        self._last_at = now
        self.num_tokens += len(frame.tokens)
        if frame.finish is not None:
            self.is_ended, self.finish = True, frame.finish
            self._metrics.observe_finish(self._request, frame.finish)
        elif frame.failure is not None:
            self.is_ended = True
            raise error_of_kind(frame.failure.kind, frame.failure.message)
        return item


class Generator:
    """Runs requests on the fleet. `open_queue` and `open_journal` give both ends for a model's name."""

    def __init__(
        self,
        *,
        open_queue: Callable[[str], RequestQueue],
        open_journal: Callable[[str], TokenJournal],
        metrics: GatewayMetrics,
        max_waiting: int,
    ) -> None:
        self._open_queue = open_queue
        self._open_journal = open_journal
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._cancels: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def stream(self, request: GenerationRequest) -> AsyncIterator[FrameStream]:
        """Queue `request` and give its frames. Leaving before their end cancels the request.

        Raises Overloaded when the queue is full and Unavailable without a broker, both before anything runs.
        """
        queue, journal = self._open_queue(request.model), self._open_journal(request.model)
        async with journal.open(request.id) as reader:
            frames = FrameStream(request, reader, self._metrics)
            try:
                await queue.enqueue(request, max_waiting=self._max_waiting)
                with self._metrics.open_requests.track_inprogress():
                    yield frames
            except Overloaded:
                frames.is_ended = True  # it was never queued
                raise
            finally:
                if not frames.is_ended:
                    self._cancel_soon(queue, request)

    async def complete(self, request: GenerationRequest) -> Completion:
        """The whole answer to `request`. Raises FleetError."""
        tokens: list[Token] = []
        prompt: tuple[TopToken, ...] = ()
        async with self.stream(request) as frames:
            async for _, frame in frames:
                tokens += frame.tokens
                prompt = prompt or frame.prompt
        assert frames.finish is not None and frames.first_token_s is not None
        text = "".join(token.text for token in tokens if not token.is_special)
        return Completion(request, text, tuple(tokens), prompt, frames.finish, frames.first_token_s)

    async def complete_all(self, requests: tuple[GenerationRequest, ...]) -> list[Completion]:
        """Whole answers, the most likely first. One failure fails all, and cancels the others."""
        if len(requests) == 1:
            return [await self.complete(requests[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.complete(request)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        answers = [task.result() for task in tasks]
        return sorted(answers, key=lambda answer: answer.mean_logprob, reverse=True)

    async def close(self) -> None:
        """Wait for the cancellations that are under way."""
        await asyncio.gather(*self._cancels)

    def _cancel_soon(self, queue: RequestQueue, request: GenerationRequest) -> None:
        """Cancel in a task of its own: the task of the request may be ending because it was cancelled itself."""
        task = asyncio.create_task(self._cancel(queue, request), name=f"cancel-{request.id}")
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, queue: RequestQueue, request: GenerationRequest) -> None:
        try:
            await queue.cancel(request.id)
        except FleetError as error:
            logger.warning(
                "could not cancel a request, it runs to its end: %s",
                error,
                extra={"request_id": request.id, "model": request.model},
            )
