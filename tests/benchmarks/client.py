"""Sends one request, reads its stream, and writes down when what came. Knows HTTP, no load pattern.

Time is that of an injected clock, read once per network chunk, as soon as the chunk is here.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, Self

import aiohttp

from tests.benchmarks.sse import EventSplitter
from tests.benchmarks.targets import Progress, Target, error_kind


class Clock(Protocol):
    """Seconds from any fixed point on, and waiting for a point."""

    def now(self) -> float: ...

    async def sleep_until(self, when: float) -> None: ...


class WallClock:
    """The real one."""

    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, when: float) -> None:
        delay = when - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. All times by the same clock."""

    intended_at: float  # when it should have been sent; latencies count from here
    sent_at: float
    token_times: list[float] = field(default_factory=list)  # one a token event
    ended_at: float = 0.0
    total_tokens: int | None = None  # by the server's count; None when it gave none
    prompt_tokens: int | None = None
    error: str | None = None  # kind, None for a stream that came to its proper end
    message: str = ""

    @property
    def num_tokens(self) -> int:
        """Output tokens: the server's count if there is one, else the events."""
        return len(self.token_times) if self.total_tokens is None else self.total_tokens

    @property
    def first_token_s(self) -> float:
        return self.token_times[0] - self.intended_at

    @property
    def whole_s(self) -> float:
        return self.ended_at - self.intended_at

    @property
    def gaps_s(self) -> list[float]:
        """Time between neighbouring token events; events of one network chunk have a gap of 0."""
        return [after - before for before, after in pairwise(self.token_times)]


class StreamClient:
    """Talks to one server. Use it as an async context manager; connections are kept alive and not
    limited.
    """

    def __init__(self, url: str, target: Target, *, clock: Clock, timeout_s: float = 120.0) -> None:
        self.clock = clock
        self._url = url.rstrip("/") + target.path
        self._target = target
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"content-type": "application/json", "accept": "text/event-stream"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def send(
        self, prompt: str, max_new_tokens: int, *, intended_at: float | None = None
    ) -> RequestRecord:
        """Run one request to its end. Never raises for what a server or the network does: see
        `error`.
        """
        body = json.dumps(self._target.body(prompt, max_new_tokens)).encode()
        sent_at = self.clock.now()
        record = RequestRecord(sent_at if intended_at is None else intended_at, sent_at)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, record)
        except TimeoutError:
            record.error = "timeout"
        except aiohttp.ClientConnectorError as error:
            record.error, record.message = "connect", str(error)
        except (aiohttp.ClientError, ConnectionError) as error:
            record.error, record.message = "disconnected", f"{type(error).__name__}: {error}"
        except ValueError as error:
            record.error, record.message = "bad event", str(error)
        if record.error is not None or not record.ended_at:
            record.ended_at = self.clock.now()
        return record

    async def _stream(self, body: bytes, record: RequestRecord) -> None:
        assert self._session is not None, "used outside of its context"
        async with self._session.post(self._url, data=body) as response:
            if response.status != 200:
                kind, record.message = error_kind(await response.read())
                record.error = f"http {response.status} {kind}".rstrip()
                return
            splitter = EventSplitter()
            has_ended = False
            async for chunk in response.content.iter_any():
                now = self.clock.now()
                for data in splitter.feed(chunk):
                    has_ended |= _note(record, self._target.read(data), now)
        if not has_ended:
            record.error, record.message = (
                "disconnected",
                "the stream stopped without its last event",
            )


def _note(record: RequestRecord, progress: Progress, now: float) -> bool:
    """Write an event down; returns whether it was the last of its stream."""
    if progress.has_token:
        record.token_times.append(now)
    if progress.total_tokens is not None:
        record.total_tokens = progress.total_tokens
    if progress.prompt_tokens is not None:
        record.prompt_tokens = progress.prompt_tokens
    if progress.error is not None:
        record.error, record.message = f"stream {progress.error}", progress.message
    if progress.has_token or progress.is_end:
        record.ended_at = now
    return progress.is_end or progress.error is not None
