"""The resuming transports against gateways in memory, which break where a test says."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest

from common.httpx_transport import AsyncResumingTransport, ResumingTransport

URLS = ("http://one:1", "http://two:2")
EVENTS = [b'id: r:%d-0\ndata: {"index": %d}\n\n' % (number, number) for number in range(4)]
GIVES_UP = b'data: {"error": "closing", "error_type": "unavailable"}\n\n'
STREAM = {"content-type": "text/event-stream"}


class Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """Some bytes, after which the connection may break."""

    def __init__(self, *chunks: bytes, breaks: bool = False) -> None:
        self.chunks = chunks
        self.breaks = breaks

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        if self.breaks:
            raise httpx2.ReadError("broken")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


class Gateways(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Answers in order, whichever gateway is asked; an exception is raised."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.handle_request(request)


def a_stream(*chunks: bytes, breaks: bool = False) -> httpx2.Response:
    return httpx2.Response(200, headers=STREAM, stream=Body(*chunks, breaks=breaks))


def read_sync(gateways: Gateways, method: str, **options) -> tuple[int, bytes]:
    transport = ResumingTransport(URLS, inner=gateways, **options)
    with httpx2.Client(transport=transport, base_url="http://fleet") as client:
        answer = client.request(method, "/generate_stream", content=b"body")
        return answer.status_code, answer.content


def read_async(gateways: Gateways, method: str, **options) -> tuple[int, bytes]:
    async def read() -> tuple[int, bytes]:
        transport = AsyncResumingTransport(URLS, inner=gateways, **options)
        async with httpx2.AsyncClient(transport=transport, base_url="http://fleet") as client:
            answer = await client.request(method, "/generate_stream", content=b"body")
            return answer.status_code, answer.content

    return asyncio.run(read())


@pytest.fixture(params=[read_sync, read_async], ids=["sync", "async"])
def read(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize(
    ("chunks", "breaks"),
    [
        ((EVENTS[0], EVENTS[1] + EVENTS[2][:9]), True),
        ((EVENTS[0] + EVENTS[1] + GIVES_UP,), False),
    ],
    ids=["broken in an event", "given up"],
)
def test_a_stream_goes_on_behind_the_last_whole_event(read, chunks, breaks):
    gateways = Gateways(a_stream(*chunks, breaks=breaks), a_stream(EVENTS[2] + EVENTS[3]))
    assert read(gateways, "POST") == (200, b"".join(EVENTS))
    begun, resumed = gateways.requests
    assert (begun.url.host, resumed.url.host) == ("one", "two")
    assert begun.headers["idempotency-key"] == resumed.headers["idempotency-key"]
    assert "last-event-id" not in begun.headers
    assert resumed.headers["last-event-id"] == "r:1-0"
    assert resumed.content == begun.content == b"body"


def test_a_gateway_that_cannot_serve_is_passed_over(read):
    gateways = Gateways(httpx2.ConnectError("none"), httpx2.Response(503), a_stream(*EVENTS))
    assert read(gateways, "POST") == (200, b"".join(EVENTS))
    assert [request.url.host for request in gateways.requests] == ["one", "two", "one"]


def test_when_patience_ends_the_last_answer_or_error_is_told(read):
    busy, none, given_up = httpx2.Response(503), httpx2.ConnectError("none"), a_stream(GIVES_UP)
    assert read(Gateways(busy, busy), "POST", patience_s=-1)[0] == 503
    with pytest.raises(httpx2.ConnectError):
        read(Gateways(none, none), "POST", patience_s=-1)
    with pytest.raises(httpx2.RemoteProtocolError):
        read(Gateways(given_up, given_up), "POST", patience_s=-1)


def test_patience_begins_with_the_first_failure(read):
    """A client may read slowly for as long as it likes before its gateway dies."""
    gateways = Gateways(a_stream(EVENTS[0], breaks=True), a_stream(*EVENTS[1:]))
    assert read(gateways, "POST", patience_s=-1) == (200, b"".join(EVENTS))


def test_a_stream_that_becomes_another_answer_is_an_error(read):
    gateways = Gateways(a_stream(EVENTS[0], breaks=True), httpx2.Response(409))
    with pytest.raises(httpx2.RemoteProtocolError, match="the gateway answered 409"):
        read(gateways, "POST")


def test_only_a_post_is_resumed(read):
    gateways = Gateways(a_stream(EVENTS[0], breaks=True))
    with pytest.raises(httpx2.ReadError):
        read(gateways, "GET")
    assert "idempotency-key" not in gateways.requests[0].headers
