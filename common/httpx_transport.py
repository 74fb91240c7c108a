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

import httpx2

from common.event_stream import Event, EventSplitter

_PAUSE_S = 0.1
_BROKEN = (httpx2.TransportError,)
_RETRY_STATUSES = frozenset({502, 503, 504})


class _Resumption:
    """What both transports share: which gateway is next, with which headers, and for how long. No I/O."""

    def __init__(
        self, urls: Sequence[httpx2.URL], request: httpx2.Request, patience_s: float
    ) -> None:
        self._urls = urls
        self._request = request
        self._patience_s = patience_s
        self._turn = 0
        self._num_failures = 0
        self._last_event_id = ""
        self._splitter = EventSplitter()
        self._key = request.headers.get("idempotency-key") or uuid.uuid4().hex
        self._renew()

    def next_request(self, content: bytes) -> httpx2.Request:
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
            request.method, url, headers=headers, content=content, extensions=request.extensions
        )

    def whole_events(self, chunk: bytes) -> tuple[bytes, bool]:
        """The bytes that the client may see, and whether the gateway gives up after them."""
        seen: list[Event] = []
        for event in self._splitter.feed(chunk):
            if event.invites_to_come_back:
                return b"".join(event.raw for event in seen), True
            seen.append(event)
            self._last_event_id = event.id or self._last_event_id
        if seen:
            self._renew()
        return b"".join(event.raw for event in seen), False

    def pause_s(self) -> float | None:
        """How long to wait before the next attempt; None when patience has ended."""
        self._turn += 1
        self._num_failures += 1
        if time.monotonic() > self._ends_at_s:
            return None
        return 0.0 if self._num_failures == 1 else _PAUSE_S

    def _renew(self) -> None:
        self._num_failures = 0
        self._ends_at_s = time.monotonic() + self._patience_s


def _is_stream(response: httpx2.Response) -> bool:
    return response.status_code == 200 and response.headers.get("content-type", "").startswith(
        "text/event-stream"
    )


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
        response = self.send(resumption, request.read())
        if request.method == "POST" and _is_stream(response):
            stream = _SyncStream(self, resumption, request.read(), response)
            return _with_stream(response, stream)
        return response

    def send(self, resumption: _Resumption, content: bytes) -> httpx2.Response:
        """The first answer that a gateway gives. Raises TransportError when patience ends."""
        while True:
            try:
                response = self._inner.handle_request(resumption.next_request(content))
            except _BROKEN:
                if (pause_s := resumption.pause_s()) is None:
                    raise
            else:
                if response.status_code not in _RETRY_STATUSES:
                    return response
                if (pause_s := resumption.pause_s()) is None:
                    return response
                response.close()
            time.sleep(pause_s)

    def close(self) -> None:
        self._inner.close()


class _SyncStream(httpx2.SyncByteStream):
    """Whole events of one generation, over as many connections as it takes."""

    def __init__(
        self,
        transport: ResumingTransport,
        resumption: _Resumption,
        content: bytes,
        response: httpx2.Response,
    ) -> None:
        self._transport = transport
        self._resumption = resumption
        self._content = content
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for chunk in self._response.stream:
                    data, gives_up = self._resumption.whole_events(chunk)
                    if data:
                        yield data
                    if gives_up:
                        raise httpx2.RemoteProtocolError("the gateway gave the stream up")
                return
            except _BROKEN:
                if self._resumption.pause_s() is None:
                    raise
            self._response.close()
            self._response = self._transport.send(self._resumption, self._content)
            _check(self._response)

    def close(self) -> None:
        self._response.close()


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
        content = await request.aread()
        response = await self.send(resumption, content)
        if request.method == "POST" and _is_stream(response):
            return _with_stream(response, _AsyncStream(self, resumption, content, response))
        return response

    async def send(self, resumption: _Resumption, content: bytes) -> httpx2.Response:
        """The first answer that a gateway gives. Raises TransportError when patience ends."""
        while True:
            try:
                request = resumption.next_request(content)
                response = await self._inner.handle_async_request(request)
            except _BROKEN:
                if (pause_s := resumption.pause_s()) is None:
                    raise
            else:
                if response.status_code not in _RETRY_STATUSES:
                    return response
                if (pause_s := resumption.pause_s()) is None:
                    return response
                await response.aclose()
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _AsyncStream(httpx2.AsyncByteStream):
    """As `_SyncStream`."""

    def __init__(
        self,
        transport: AsyncResumingTransport,
        resumption: _Resumption,
        content: bytes,
        response: httpx2.Response,
    ) -> None:
        self._transport = transport
        self._resumption = resumption
        self._content = content
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async for chunk in self._response.stream:
                    data, gives_up = self._resumption.whole_events(chunk)
                    if data:
                        yield data
                    if gives_up:
                        raise httpx2.RemoteProtocolError("the gateway gave the stream up")
                return
            except _BROKEN:
                if self._resumption.pause_s() is None:
                    raise
            await self._response.aclose()
            self._response = await self._transport.send(self._resumption, self._content)
            _check(self._response)

    async def aclose(self) -> None:
        await self._response.aclose()


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


def _check(response: httpx2.Response) -> None:
    """A stream that was begun can only go on as a stream."""
    if not _is_stream(response):
        raise httpx2.RemoteProtocolError(
            f"the stream cannot go on: the gateway answered {response.status_code}"
        )
