"""A client that asks for much and reads nothing of it, on a port of ours."""

import asyncio

import pytest
from aiohttp import web

from gateway import connection
from gateway.connection import Site


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch):
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.1)
    ended = asyncio.get_running_loop().create_future()

    async def much(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"a" * 1_000_000)
        except BaseException as error:
            ended.set_result(error)
            raise

    app = web.Application()
    app.router.add_get("/", much)
    runner = web.AppRunner(app)
    await runner.setup()
    site = Site(runner, "127.0.0.1", 0, read_timeout_s=5.0)
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, limit=1 << 12)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    async with asyncio.timeout(10):
        assert isinstance(await ended, ConnectionError)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1 << 30)
    writer.close()
    await runner.cleanup()
