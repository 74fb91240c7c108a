"""Commands that share a connection: each caller has its own reply, whatever becomes of the others."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import hiredis
import pytest
import trustme
from redis.exceptions import ConnectionError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common import wire
from common.wire import BrokerAddress, SharedWire

pytestmark = pytest.mark.usefixtures("deadline")


class Broker:
    """Notes commands, and answers when it is told to."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.num_connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)
        parser = hiredis.Reader()
        while data := await reader.read(1 << 16):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                self.commands.put_nowait(command)
        writer.close()

    def answer(self, data: bytes) -> None:
        self._writers[-1].write(data)

    def hang_up(self) -> None:
        self._writers[-1].transport.abort()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = Broker()
    server = await asyncio.start_unix_server(broker.serve, tmp_path / "broker.sock")
    yield broker
    server.close()
    broker.close()


@pytest.fixture
async def shared(broker: Broker, tmp_path: Path) -> AsyncIterator[SharedWire]:
    address = BrokerAddress.parse(f"unix://{tmp_path}/broker.sock")
    shared = SharedWire(address, timeout_s=0.05)
    yield shared
    await shared.close()


async def test_replies_come_in_the_order_of_the_commands(shared: SharedWire, broker: Broker):
    calls = [asyncio.create_task(shared.call(("GET", key))) for key in ("a", b"b", 3)]
    assert [await broker.commands.get() for _ in calls] == [
        [b"GET", key] for key in (b"a", b"b", b"3")
    ]
    broker.answer(b"$1\r\nx\r\n-ERR no\r\n:7\r\n")
    assert await calls[0] == b"x"
    with pytest.raises(Exception, match="no"):
        await calls[1]
    assert await calls[2] == 7
    assert broker.num_connections == 1


async def test_a_cancelled_callers_reply_is_nobody_elses(shared: SharedWire, broker: Broker):
    calls = [asyncio.create_task(shared.call(("GET", key))) for key in "ab"]
    for _ in calls:
        await broker.commands.get()
    calls[0].cancel()
    await asyncio.sleep(0)
    broker.answer(b":1\r\n:2\r\n")
    assert await calls[1] == 2


async def test_a_lost_connection_is_told_to_all_and_opened_again(
    shared: SharedWire, broker: Broker
):
    calls = [asyncio.create_task(shared.call(("GET", key))) for key in "ab"]
    for _ in calls:
        await broker.commands.get()
    broker.hang_up()
    for call in calls:
        with pytest.raises(ConnectionError):
            await call
    again = asyncio.create_task(shared.call(("GET", "c")))
    await broker.commands.get()
    broker.answer(b":3\r\n")
    assert await again == 3 and broker.num_connections == 2


async def test_a_broker_that_does_not_answer_is_left(
    shared: SharedWire, broker: Broker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wire, "_LOOK_S", 0.02)
    with pytest.raises(RedisTimeoutError):
        await shared.call(("GET", "a"))
    again = asyncio.create_task(shared.call(("GET", "b")))
    for _ in range(2):
        await broker.commands.get()
    broker.answer(b":2\r\n")
    assert await again == 2 and broker.num_connections == 2


async def test_a_broker_that_became_a_replica_is_left(shared: SharedWire, broker: Broker):
    call = asyncio.create_task(shared.call(("SET", "a", 1)))
    await broker.commands.get()
    broker.answer(b"-READONLY You can't write against a read only replica.\r\n")
    with pytest.raises(ReadOnlyError):
        await call
    again = asyncio.create_task(shared.call(("SET", "a", 1)))
    await broker.commands.get()
    assert broker.num_connections == 2
    broker.answer(b"+OK\r\n")
    assert await again == b"OK"


async def test_what_is_no_reply_ends_the_connection(shared: SharedWire, broker: Broker):
    call = asyncio.create_task(shared.call(("GET", "a")))
    await broker.commands.get()
    broker.answer(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(Exception, match="Protocol error"):
        await call


async def test_who_logs_in_does_so_before_anything_else(broker: Broker, tmp_path: Path):
    shared = SharedWire(
        BrokerAddress.parse(f"unix://me:secret@{tmp_path}/broker.sock?db=3"), timeout_s=5
    )
    call = asyncio.create_task(shared.call(("GET", "a")))
    assert await broker.commands.get() == [b"AUTH", b"me", b"secret"]
    broker.answer(b"+OK\r\n")
    assert await broker.commands.get() == [b"SELECT", b"3"]
    broker.answer(b"+OK\r\n")
    assert await broker.commands.get() == [b"GET", b"a"]
    broker.answer(b":1\r\n")
    assert await call == 1
    await shared.close()


async def test_a_refused_login_is_an_error_of_every_call(broker: Broker, tmp_path: Path):
    shared = SharedWire(BrokerAddress.parse(f"unix://:no@{tmp_path}/broker.sock"), timeout_s=5)
    calls = [asyncio.create_task(shared.call(("GET", "a"))) for _ in range(2)]
    await broker.commands.get()
    broker.answer(b"-WRONGPASS invalid username-password pair or user is disabled.\r\n")
    for call in calls:
        with pytest.raises(Exception, match="invalid username-password"):
            await call
    await shared.close()


async def test_nobody_there_is_a_connection_error(tmp_path: Path):
    shared = SharedWire(BrokerAddress.parse(f"unix://{tmp_path}/none.sock"), timeout_s=5)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        await shared.call(("PING",))


async def test_over_tls_the_authority_is_the_one_that_the_url_names(broker: Broker, tmp_path: Path):
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = await asyncio.start_server(broker.serve, "127.0.0.1", ssl=context)
    url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    stranger = SharedWire(BrokerAddress.parse(url), timeout_s=5)
    with pytest.raises(ConnectionError, match="certificate verify failed"):
        await stranger.call(("PING",))
    shared = SharedWire(BrokerAddress.parse(f"{url}?ssl_ca_certs={tmp_path}/ca.pem"), timeout_s=5)
    call = asyncio.create_task(shared.call(("PING",)))
    assert await broker.commands.get() == [b"PING"]
    broker.answer(b"+PONG\r\n")
    assert await call == b"PONG"
    await shared.close()
    server.close()


async def test_all_cancelled_at_once_while_it_connects(tmp_path: Path):
    """The caller and the attempt that it waits for: the caller's cancellation is its own."""
    accepted = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        try:
            await reader.read()
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(silent, tmp_path / "silent.sock")
    shared = SharedWire(BrokerAddress.parse(f"unix://:x@{tmp_path}/silent.sock"), timeout_s=5)
    caller = asyncio.create_task(shared.call(("PING",)))
    await accepted.wait()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if task is caller or task.get_name() == "connect to the broker":
            task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    server.close()


async def test_who_waits_while_it_is_closed_hears_of_it(broker: Broker, tmp_path: Path):
    shared = SharedWire(BrokerAddress.parse(f"unix://:x@{tmp_path}/broker.sock"), timeout_s=5)
    caller = asyncio.create_task(shared.call(("PING",)))
    await broker.commands.get()
    await shared.close()
    with pytest.raises(ConnectionError, match="closed"):
        await caller


async def test_once_closed_it_opens_no_connection_any_more(shared: SharedWire, broker: Broker):
    call = asyncio.create_task(shared.call(("GET", "a")))
    await broker.commands.get()
    broker.answer(b":1\r\n")
    assert await call == 1
    await shared.close()
    with pytest.raises(ConnectionError, match="the client was closed"):
        await shared.call(("GET", "a"))
    assert broker.num_connections == 1
