"""The probe of a gateway on this machine."""

import asyncio
import gc
import ssl

import pytest
import trustme

from common.probe import is_healthy

pytestmark = pytest.mark.usefixtures("deadline")


class Gateway:
    """Answers with one status, and then hears nothing any more: no goodbye of TLS either."""

    def __init__(self, status: bytes) -> None:
        self._status = status
        self._is_over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.0 %b\r\n\r\n" % self._status)
            await writer.drain()
            writer.transport.pause_reading()
            await self._is_over.wait()
        finally:
            writer.transport.abort()

    async def ask(self, context: ssl.SSLContext | None = None) -> bool:
        """As the command does: with an event loop that ends as soon as there is an answer."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", ssl=context)
        port = server.sockets[0].getsockname()[1]

        def probe() -> bool:
            return asyncio.run(is_healthy("127.0.0.1", port, has_tls=context is not None))

        try:
            return await asyncio.to_thread(probe)
        finally:
            self._is_over.set()
            server.close()


@pytest.fixture
def context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("status", "is_well"), [(b"200 OK", True), (b"503 Service Unavailable", False), (b"", False)]
)
async def test_only_200_is_healthy(status: bytes, is_well: bool):
    assert await Gateway(status).ask() is is_well


async def test_nobody_there(free_port: int):
    assert not await is_healthy("127.0.0.1", free_port, has_tls=False)


async def test_nothing_is_left_open_over_tls(context: ssl.SSLContext):
    """What is left open complains when it is collected, and the test run fails."""
    assert await Gateway(b"200 OK").ask(context)
    gc.collect()
