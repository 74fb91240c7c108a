"""Writes of one turn of the event loop: together, in order, and never behind what is written another way."""

import asyncio

import pytest
from aiohttp import ClientPayloadError, web
from aiohttp.test_utils import TestClient, TestServer

from gateway.outbox import Outbox
from gateway.sse import EventStream


class Wire:
    """A transport that remembers what came, of all wires in one list."""

    def __init__(self, name: str, seen: list[tuple[str, bytes]]) -> None:
        self._name = name
        self._seen = seen
        self.is_closed = False

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self._seen.append((self._name, data))


async def test_writes_leave_in_order_at_the_end_of_the_turn():
    seen, outbox = [], Outbox()
    one, other = Wire("one", seen), Wire("other", seen)
    for wire, data in [(one, b"1"), (other, b"2"), (one, b"3")]:
        outbox.put(wire, data)
    assert not seen
    await asyncio.sleep(0)
    assert seen == [("one", b"1"), ("other", b"2"), ("one", b"3")]


async def test_what_was_flushed_is_not_sent_again():
    seen, outbox = [], Outbox()
    wire = Wire("one", seen)
    outbox.put(wire, b"1")
    outbox.flush()
    outbox.put(wire, b"2")
    assert seen == [("one", b"1")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert seen == [("one", b"1"), ("one", b"2")]


async def test_a_closed_transport_loses_its_own_writes_only():
    seen, outbox = [], Outbox()
    closed, other = Wire("closed", seen), Wire("other", seen)
    outbox.put(closed, b"1")
    outbox.put(other, b"2")
    closed.is_closed = True
    await asyncio.sleep(0)
    assert seen == [("other", b"2")]


async def test_many_writes_do_not_wait_for_the_end_of_the_turn():
    seen, outbox = [], Outbox()
    wire = Wire("one", seen)
    for number in range(600):
        outbox.put(wire, b"%d" % number)
    assert len(seen) == 512
    await asyncio.sleep(0)
    assert [data for _, data in seen] == [b"%d" % number for number in range(600)]


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_response_keeps_its_order_however_it_is_written(is_cut: bool):
    outbox = Outbox()

    async def handler(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, outbox, keep_alive_s=10.0) as events:
            events.send(b"data: 1\n\n")
            await events.write(b"data: 2\n\n")
            events.send(b"data: 3\n\n")
            if is_cut:
                events.cut()
        return events.response

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client, client.get("/") as response:
        text = b""
        try:
            async for piece in response.content.iter_any():
                text += piece
        except ClientPayloadError:
            assert is_cut
        else:
            assert not is_cut
    assert text == b":\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\n"
