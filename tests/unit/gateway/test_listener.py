"""The open port: who waits is let in, whatever else the event loop does."""

import asyncio
import logging
import os
import resource
import socket
import time
from contextlib import ExitStack, contextmanager

import pytest
import uvloop

from gateway import listener
from gateway.listener import Listener


class Greeter(asyncio.Protocol):
    """Says hello to whom it meets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(b"hello")
        transport.close()


async def open_port(**values) -> tuple[Listener, int]:
    port = Listener(Greeter)
    await port.open("127.0.0.1", 0, backlog=200, **values)
    return port, port.sockets[0].getsockname()[1]


async def greeting_of(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    greeting = await reader.read()
    writer.close()
    await writer.wait_closed()
    return greeting


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_all_who_wait_are_let_in_however_long_a_turn_of_the_loop_is(new_loop):
    num_clients, num_turns, num_met = 100, 0, 0

    async def main() -> None:
        nonlocal num_turns
        loop, all_met = asyncio.get_running_loop(), asyncio.Event()

        class Host(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                nonlocal num_met
                num_met += 1
                if num_met == num_clients:
                    all_met.set()

        def work() -> None:
            nonlocal num_turns
            num_turns += 1
            time.sleep(0.002)  # a turn that has much to do
            if not all_met.is_set():
                loop.call_later(0, work)

        port = Listener(Host)
        await port.open("127.0.0.1", 0, backlog=num_clients)
        with ExitStack() as stack:
            for _ in range(num_clients):
                address = port.sockets[0].getsockname()
                stack.enter_context(socket.create_connection(address))
            work()
            async with asyncio.timeout(10):
                await all_met.wait()
        port.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert num_turns < num_clients / 10


@contextmanager
def no_descriptors_left():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_without_file_descriptors_clients_wait_until_there_are_some(monkeypatch, caplog):
    monkeypatch.setattr(listener, "PAUSE_S", 0.05)
    port, number = await open_port()
    client = socket.create_connection(("127.0.0.1", number))
    client.setblocking(False)
    with no_descriptors_left(), caplog.at_level(logging.ERROR):
        async with asyncio.timeout(10):
            while not caplog.messages:
                await asyncio.sleep(0)
    assert "no connection can be accepted for 0.05 s: [Errno 24]" in caplog.messages[0]
    async with asyncio.timeout(10):
        assert await asyncio.get_running_loop().sock_recv(client, 10) == b"hello"
    client.close()
    port.close()


async def test_a_port_closed_while_it_waits_for_descriptors_stays_closed(monkeypatch, caplog):
    monkeypatch.setattr(listener, "PAUSE_S", 0.01)
    port, number = await open_port()
    with socket.create_connection(("127.0.0.1", number)), no_descriptors_left():
        async with asyncio.timeout(10):
            while not caplog.messages:
                await asyncio.sleep(0)
        port.close()
    await asyncio.sleep(0.02)  # the pause is over
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", number))


async def test_a_taken_port_is_an_error_that_names_it():
    port, number = await open_port()
    other = Listener(Greeter)
    with pytest.raises(OSError, match=rf"in use.*127\.0\.0\.1.*{number}"):
        await other.open("127.0.0.1", number, backlog=1)
    assert not other.sockets
    port.close()


async def test_processes_share_a_port_only_when_told_to():
    port, number = await open_port(shares_port=True)
    other = Listener(Greeter)
    await other.open("127.0.0.1", number, backlog=10, shares_port=True)
    assert await greeting_of(number) == b"hello"
    port.close()
    assert await greeting_of(number) == b"hello"
    other.close()


async def test_an_address_that_this_machine_has_not_is_left_out_where_the_name_has_another(
    monkeypatch,
):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 0)),  # RFC 5737: nobody's
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]

    async def getaddrinfo(*args, **values):
        return found

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    port = Listener(Greeter)
    await port.open("a-name", 0, backlog=1)
    assert await greeting_of(port.sockets[0].getsockname()[1]) == b"hello"
    port.close()

    found.pop()
    with pytest.raises(OSError, match=r"assign.*203\.0\.113\.1"):
        await Listener(Greeter).open("a-name", 0, backlog=1)
