"""HTTPS: one process, two on a port, `serve`; certificates that are replaced, and files that cannot be used."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization

from common.cli import main
from gateway.tls import Certificate
from tests.fleet import Process

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> tuple[str, str]:
    """Certificate and key for this machine."""
    return write(authority.issue_cert("127.0.0.1"), tmp_path)


def write(leaf: trustme.LeafCert, folder: Path) -> tuple[str, str]:
    cert, key = folder / "tls.crt", folder / "tls.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(key)
    return str(cert), str(key)


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[Process]:
    process = await Process.start(*arguments)
    try:
        yield process
    finally:
        await process.stop()


def options(files: tuple[str, str], port: int) -> list[str]:
    address = ["--hostname", "127.0.0.1", "--port", str(port)]
    return [*address, "--tls-cert", files[0], "--tls-key", files[1]]


async def get(port: int, context: ssl.SSLContext, path: str = "/health/live") -> int:
    url = f"https://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
        return response.status


async def served_until(port: int, context: ssl.SSLContext) -> int:
    """When the certificate that new connections are shown ends."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    serial = writer.get_extra_info("peercert")["serialNumber"]
    writer.transport.abort()
    return int(serial, 16)


async def test_gateway(redis_url, free_port, files, client_context, authority, tmp_path):
    arguments = ("gateway", "--redis-url", redis_url, *options(files, free_port))
    async with running(*arguments) as process:
        assert f"https://127.0.0.1:{free_port}" in await process.logged("listening")
        assert await get(free_port, client_context) == 200
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await plain_text(free_port)

        before = await served_until(free_port, client_context)
        write(authority.issue_cert("127.0.0.1"), tmp_path)
        await process.logged("the certificate was read again")
        after = await served_until(free_port, client_context)
        assert after != before
        Path(files[1]).write_text("no key")
        await process.logged("the certificate stays as it was")
        assert await served_until(free_port, client_context) == after


async def plain_text(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    try:
        await reader.readuntil(b"HTTP/1.1")
    finally:
        writer.close()


async def test_several_processes(redis_url, free_port, files, client_context):
    arguments = ("gateway", "--redis-url", redis_url, *options(files, free_port))
    async with running(*arguments, "--gateway-workers", "2", "--drain-s", "1") as process:
        await process.logged("listening")
        for _ in range(4):
            assert await get(free_port, client_context) == 200


async def test_serve_waits_for_its_gateway_over_tls(free_port, files, client_context):
    async with running("serve", "--model-id", "echo", *options(files, free_port)) as process:
        line = await process.logged("is ready after")
        assert f"https://127.0.0.1:{free_port}/generate_stream" in line
        assert await get(free_port, client_context, "/health") == 200
        assert (await asyncio.to_thread(health, free_port)).output == "ok\n"
        url = f"https://127.0.0.1:{free_port}/generate_stream"
        body = {"inputs": "abc"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=body, ssl=client_context) as response,
        ):
            assert (await response.text()).count("data: ") == 4
        assert await process.stop(signal.SIGTERM) == 0
    told = await asyncio.to_thread(health, free_port)
    assert told.exit_code == 1 and f"127.0.0.1:{free_port}" in told.output


def health(port: int) -> Result:
    return CliRunner().invoke(main, ["health", "--port", str(port)])


@pytest.mark.parametrize(
    ("command", "cert", "key", "message"),
    [
        ("serve --model-id echo", "none.crt", "tls.key", "cannot read the TLS certificate"),
        ("gateway", "tls.crt", "none.key", "cannot read the TLS key"),
        ("gateway", "tls.crt", "other.key", "belong together"),
        ("gateway", "tls.key", "tls.key", "cannot be used"),
        ("gateway", "tls.crt", "secret.key", "the key must have no password"),
    ],
)
async def test_files_that_cannot_be_used(
    redis_url, free_port, files, authority, tmp_path, command, cert, key, message
):
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "other.key")
    (tmp_path / "secret.key").write_bytes(encrypted(Path(files[1]).read_bytes()))
    names = str(tmp_path / cert), str(tmp_path / key)
    process = await Process.start(
        *command.split(), "--redis-url", redis_url, *options(names, free_port)
    )
    assert message in await process.logged("Error: ")
    assert await process.process.wait() == 1
    await process.stop()


def encrypted(key: bytes) -> bytes:
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def test_old_versions_are_refused(files):
    assert Certificate(*files).context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_one_without_the_other():
    process = await Process.start("gateway", "--tls-cert", "tls.crt")
    await process.logged("`tls_cert` and `tls_key` need each other")
    assert await process.process.wait() == 2
    await process.stop()
