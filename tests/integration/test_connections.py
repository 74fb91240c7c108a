"""What happens below HTTP: clients that dawdle, clients that do not read, and bytes that are no request."""

import asyncio
import json
import os
import resource
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.fleet import Fleet, Process, free_port

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

HEAD = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
READ_S = 0.8


@pytest.fixture
async def url(fleet: Fleet) -> str:
    await fleet.worker()
    return await fleet.gateway("--read-timeout-s", str(READ_S), "--keep-alive-s", "0.1")


@asynccontextmanager
async def connected(
    url: str, *, receive_buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = url.removeprefix("http://").partition(":")
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer:  # before the connection is made, or the kernel has promised more
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 14)
    try:
        yield reader, writer
    finally:
        writer.close()


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """A byte every twentieth of the time that is allowed, until nobody listens."""
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(READ_S / 20)


async def whole_answer(reader: asyncio.StreamReader) -> tuple[int, dict, dict]:
    """Status, headers and body of the only answer on a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, json.loads(body)


async def test_clients_that_dawdle_are_cut(url):
    async with connected(url) as (reader, writer):
        dripping = asyncio.create_task(drip(writer, HEAD * 10))
        status, headers, body = await whole_answer(reader)
        assert (status, body["error_type"]) == (408, "request_timeout")
        assert headers["connection"] == "close" and "headers" in body["error"]
        assert await reader.read() == b""
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    async with connected(url) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, b" " * 1000))
        status, headers, body = await whole_answer(reader)
        assert (status, body["error_type"]) == (408, "request_timeout")
        assert headers["connection"] == "close" and "body" in body["error"]
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def test_connections_that_rest_between_requests_are_kept(url):
    request = HEAD + b"Content-Length: 15\r\n\r\n" + b'{"inputs": "a"}'
    async with connected(url) as (reader, writer):
        for part in (request[:5], request[5:]):
            writer.write(part)
            await asyncio.sleep(0.05)
        assert (await whole_answer(reader))[0] == 200
        await asyncio.sleep(READ_S * 1.2)  # longer than any half request may take
        writer.write(request)
        assert (await whole_answer(reader))[0] == 200


async def test_a_connection_that_says_nothing_is_closed(url):
    async with connected(url) as (reader, _), asyncio.timeout(20):
        assert await reader.read() == b"", "nothing was asked, so nothing is answered"


@pytest.mark.parametrize("half", [b"G", HEAD[:30], HEAD, HEAD + b"Content-Length: 1000\r\n"])
async def test_half_a_request_behind_another_is_cut(url, half):
    first = HEAD + b"Content-Length: 15\r\n\r\n" + b'{"inputs": "a"}'
    async with connected(url) as (reader, writer), asyncio.timeout(20):
        writer.write(first + half)
        assert (await whole_answer(reader))[0] == 200
        status, headers, body = await whole_answer(reader)
        assert (status, body["error_type"]) == (408, "request_timeout")
        assert headers["connection"] == "close" and await reader.read() == b""


def bomb(num_bytes: int) -> bytes:
    """Zeros, a thousand times smaller: blocks that know nothing of each other."""
    step = 1 << 24
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(step)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (num_bytes // step) + packer.flush()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("path", "num_bytes", "status"), [("/nothing", 6 << 30, 404), ("/generate", 3 << 29, 413)]
)
async def test_what_nobody_reads_is_not_inflated(fleet, path, num_bytes, status):
    """The second request is served on the same connection, once the body of the first is out of the way."""
    url = await fleet.gateway(ready="/health/live")
    pid = fleet.processes[-1].process.pid
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Encoding: deflate\r\nContent-Length: {len(data := bomb(num_bytes))}\r\n\r\n"
    )
    before = cpu_s(pid)
    async with connected(url) as (reader, writer), asyncio.timeout(60):
        writer.write(head.encode() + data + b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await whole_answer(reader))[0] == status
        assert (await whole_answer(reader))[0] == 404
    assert cpu_s(pid) - before < 0.4, "inflating all of it takes more than a second"


async def test_a_gateway_may_open_as_many_files_as_the_system_allows(fleet):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
    try:
        await fleet.gateway(ready="/health/live")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    pid = fleet.processes[-1].process.pid
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (limits[1], limits[1])


async def test_what_no_middleware_sees_is_answered_in_json(shared_url):
    async with connected(shared_url) as (reader, writer):
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: a\r\nExpect: a-pony\r\n\r\n")
        status, _, body = await whole_answer(reader)
    assert status == 417 and "a-pony" in body["error"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_answered_in_json(data, shared_url):
    async with connected(shared_url) as (reader, writer):
        writer.write(data)
        status, headers, body = await whole_answer(reader)
    assert status == 400 and headers["content-type"].startswith("application/json")
    assert set(body) == {"error", "error_type"}
    assert len(body["error"]) < 300, "what was sent is not sent back"


@pytest.fixture(scope="module")
def shared_url(redis_server: str):
    """A gateway without a worker: nothing here comes as far as a model."""
    with asyncio.Runner() as runner:
        fleet = Fleet(redis_server)
        try:
            yield runner.run(_gateway_without_worker(fleet))
        finally:
            runner.run(fleet.stop())


async def _gateway_without_worker(fleet: Fleet) -> str:
    port = free_port()
    options = ("--redis-url", fleet.redis_url, "--hostname", "127.0.0.1", "--port", str(port))
    process = await Process.start("gateway", *options)
    fleet.processes.append(process)
    await process.logged("listening")
    return f"http://127.0.0.1:{port}"


async def test_reader_that_does_not_read_is_cut_and_its_generation_cancelled(fleet):
    """Only once the kernel's buffers are full: before that nobody can tell it from a fast one."""
    await fleet.worker("--max-total-tokens", "200000")
    url = await fleet.gateway("--keep-alive-s", "0.1")
    parameters = {"max_new_tokens": 150_000, "ignore_eos_token": True, "top_n_tokens": 5}
    data = json.dumps({"inputs": "a" * 100, "parameters": parameters}).encode()
    head = HEAD.replace(b"/generate ", b"/generate_stream ")
    async with (
        connected(url, receive_buffer=4096) as (_, writer),
        aiohttp.ClientSession() as session,
    ):
        writer.transport.pause_reading()
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        line = await fleet.processes[-1].logged("POST /generate_stream closed")
        request_id = line.partition("request_id=")[2].split()[0]
        while True:
            async with session.get(f"{url}/requests/{request_id}") as response:
                found = await response.json()
            if found["state"] != "running":
                break
            await asyncio.sleep(0.02)  # until the worker heard of it
        assert found["state"] == "cancelled" and found["generated_tokens"] < 150_000
