"""Several gateway processes behind one port, run as a user runs them."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]


@asynccontextmanager
async def gateway(
    port: int, redis_url: str, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "--hostname", "127.0.0.1", "--port", str(port)),
        *("--redis-url", redis_url, *options),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def lines_until(
    process: asyncio.subprocess.Process, pattern: str, count: int = 1
) -> list[str]:
    """Read the log until `count` lines match."""
    found: list[str] = []
    assert process.stderr
    while len(found) < count:
        line = (await process.stderr.readline()).decode()
        assert line, f"the log ended before {pattern!r}"
        if re.search(pattern, line):
            found.append(line)
    return found


async def get(port: int, path: str) -> str:
    """A new connection each time, so that the kernel may choose another process."""
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
        session.get(path) as response,
    ):
        return await response.text()


async def test_processes_share_the_port_and_are_replaced(redis_url, free_port):
    async with gateway(free_port, redis_url, "--gateway-workers", "2", "--drain-s", "1") as process:
        await lines_until(process, "listening", count=2)
        assert "tgi_request_count 0.0" in await get(free_port, "/metrics")
        children = children_of(process.pid)
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        await lines_until(process, "ended and is replaced")
        await lines_until(process, "listening")
        assert await get(free_port, "/health/live") == ""
        process.terminate()
        assert await process.wait() == 0


async def test_children_end_with_a_supervisor_that_was_killed(redis_url, free_port):
    async with gateway(free_port, redis_url, "--gateway-workers", "2", "--drain-s", "1") as process:
        await lines_until(process, "listening", count=2)
        process.kill()
        await lines_until(process, "stopped", count=2)


async def test_one_process_stops_on_sigterm(redis_url, free_port):
    async with gateway(free_port, redis_url, "--json-output") as process:
        (line,) = await lines_until(process, "listening")
        assert f'"address": "http://127.0.0.1:{free_port}"' in line
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.parametrize("options", [(), ("--gateway-workers", "2")])
async def test_port_in_use_is_said_in_one_line(redis_url, options):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        async with gateway(port, redis_url, *options) as process:
            await lines_until(process, rf"Error: cannot listen on 127\.0\.0\.1:{port}: .*in use")
            assert await process.wait() == 1


def children_of(pid: int) -> list[int]:
    """Direct children that serve; multiprocessing also starts a resource tracker."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [child for child in children if "spawn_main" in command_of(child)]


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().replace("\0", " ")
