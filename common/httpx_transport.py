"""Transports under which unmodified clients (openai, huggingface_hub) survive the death of a gateway.

    client = openai.OpenAI(base_url=..., http_client=httpx2.Client(transport=ResumingTransport(urls)))

A POST goes out with an `Idempotency-Key`. When its connection breaks, the same POST goes to the next gateway with the
`Last-Event-ID` of the last whole event, and the client reads on as if nothing had happened. Anything but a POST, and
any answer that is no event stream, passes through as it is.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import httpx2

from common.event_stream import Event, EventSplitter

_PAUSE_S = 0.1
_BROKEN = (httpx2.TransportError,)
_RETRY_STATUSES = frozenset({502, 503, 504})


class _Resumption:
    """What both transports share: the next request, what an answer means, and patience. No I/O.

    The body of the client's request has been read before the first `next_request`.
    """

    def __init__(
        self, urls: Sequence[httpx2.URL], request: httpx2.Request, patience_s: float
    ) -> None:
        self._urls = urls
        self._request = request
        self._patience_s = patience_s
        self._turn = 0
        self._num_failures = 0  # in a row
        self._ends_at_s = 0.0
        self._last_event_id = ""
        self._splitter = EventSplitter()
        self._key = request.headers.get("idempotency-key") or uuid.uuid4().hex

    def next_request(self) -> httpx2.Request:
        """The client's request, to the gateway whose turn it is."""
        request, gateway = self._request, self._urls[self._turn % len(self._urls)]
        url = request.url.copy_with(scheme=gateway.scheme, host=gateway.host, port=gateway.port)
        headers = httpx2.Headers(request.headers)
        headers["host"] = url.netloc.decode("ascii")
        if request.method == "POST":
            headers["idempotency-key"] = self._key
        if self._last_event_id:
            headers["last-event-id"] = self._last_event_id
        self._splitter = EventSplitter()  # half an event comes again
        return httpx2.Request(
            request.method,
            url,
            headers=headers,
            content=request.content,
            extensions=request.extensions,
        )

    def is_resumable(self, response: httpx2.Response) -> bool:
        """Whether the answer's body can go on at another gateway."""
        return self._request.method == "POST" and _is_stream(response)

    def whole_events(self, chunk: bytes) -> Iterator[bytes]:
        """What the client may see of `chunk`. Raises RemoteProtocolError if the gateway gives up."""
        seen: list[Event] = []
        gives_up = False
        for event in self._splitter.feed(chunk):
            if gives_up := event.invites_to_come_back:
                break
            seen.append(event)
            self._last_event_id = event.id or self._last_event_id
        if seen and not gives_up:
            self._num_failures = 0
        if seen:
            yield b"".join(event.raw for event in seen)
        if gives_up:
            raise httpx2.RemoteProtocolError("the gateway gave the stream up")

    def pause_after_answer_s(self, response: httpx2.Response) -> float | None:
        """How long to wait before the next attempt; None when this answer is the client's."""
        return self.pause_s() if response.status_code in _RETRY_STATUSES else None

    def pause_s(self) -> float | None:
        """How long to wait before the next attempt; None when patience has ended."""
        self._turn += 1
        self._num_failures += 1
        if self._num_failures == 1:  # however long ago the client read: it may be slow
            self._ends_at_s = time.monotonic() + self._patience_s
            return 0.0
        return None if time.monotonic() > self._ends_at_s else _PAUSE_S


class ResumingTransport(httpx2.BaseTransport):
    """For `httpx2.Client`. The origin of a request's URL is replaced by that of a gateway."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        inner: httpx2.BaseTransport | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self._urls = [httpx2.URL(url) for url in urls]
        self._inner = inner or httpx2.HTTPTransport()
        self._patience_s = patience_s

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        resumption = _Resumption(self._urls, request, self._patience_s)
        request.read()
        response = self.send(resumption)
        if resumption.is_resumable(response):
            return _with_stream(response, _SyncStream(self, resumption, response))
        return response

    def send(self, resumption: _Resumption) -> httpx2.Response:
        """The first answer that a gateway gives. Raises TransportError when patience ends."""
        while True:
            try:
                response = self._inner.handle_request(resumption.next_request())
            except _BROKEN:
                if (pause_s := resumption.pause_s()) is None:
                    raise
            else:
                if (pause_s := resumption.pause_after_answer_s(response)) is None:
                    return response
                response.close()
            time.sleep(pause_s)

    def close(self) -> None:
        self._inner.close()


@dataclass(eq=False, slots=True)
class _SyncStream(httpx2.SyncByteStream):
    """Whole events of one generation, over as many connections as it takes."""

    transport: ResumingTransport
    resumption: _Resumption
    response: httpx2.Response

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for chunk in self.response.stream:
                    yield from self.resumption.whole_events(chunk)
                return
            except _BROKEN:
                if self.resumption.pause_s() is None:
                    raise
            self.response.close()
            self.response = self.transport.send(self.resumption)
            _require_stream(self.response)

    def close(self) -> None:
        self.response.close()


class AsyncResumingTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient`. The origin of a request's URL is replaced by that of a gateway."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        inner: httpx2.AsyncBaseTransport | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self._urls = [httpx2.URL(url) for url in urls]
        self._inner = inner or httpx2.AsyncHTTPTransport()
        self._patience_s = patience_s

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        resumption = _Resumption(self._urls, request, self._patience_s)
        await request.aread()
        response = await self.send(resumption)
        if resumption.is_resumable(response):
            return _with_stream(response, _AsyncStream(self, resumption, response))
        return response

    async def send(self, resumption: _Resumption) -> httpx2.Response:
        """As `ResumingTransport.send`."""
        while True:
            try:
                response = await self._inner.handle_async_request(resumption.next_request())
            except _BROKEN:
                if (pause_s := resumption.pause_s()) is None:
                    raise
            else:
                if (pause_s := resumption.pause_after_answer_s(response)) is None:
                    return response
                await response.aclose()
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        await self._inner.aclose()


@dataclass(eq=False, slots=True)
class _AsyncStream(httpx2.AsyncByteStream):
    """As `_SyncStream`."""

    transport: AsyncResumingTransport
    resumption: _Resumption
    response: httpx2.Response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async for chunk in self.response.stream:
                    for data in self.resumption.whole_events(chunk):
                        yield data
                return
            except _BROKEN:
                if self.resumption.pause_s() is None:
                    raise
            await self.response.aclose()
            self.response = await self.transport.send(self.resumption)
            _require_stream(self.response)

    async def aclose(self) -> None:
        await self.response.aclose()


def _with_stream(
    response: httpx2.Response, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream
) -> httpx2.Response:
    """The answer whose body goes on elsewhere when it breaks."""
    return httpx2.Response(
        response.status_code,
        headers=response.headers,
        stream=stream,
        extensions=response.extensions,
    )


def _is_stream(response: httpx2.Response) -> bool:
    return response.status_code == 200 and response.headers.get("content-type", "").startswith(
        "text/event-stream"
    )


def _require_stream(response: httpx2.Response) -> None:
    """A stream that was begun can only go on as a stream."""
    if not _is_stream(response):
        raise httpx2.RemoteProtocolError(
            f"the stream cannot go on: the gateway answered {response.status_code}"
        )
