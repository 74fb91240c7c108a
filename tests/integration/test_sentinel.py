"""A broker behind Sentinel: clients and the pub/sub connection find the primary, also after a failover."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.redis_client import open_redis
from common.sentinel import SentinelSet
from common.subscriber import Subscriber
from tests.chaos.servers import ChaosBroker
from tests.conftest import server_binary
from tests.fleet import free_port

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

SERVICE = "fleet"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[ChaosBroker]:
    broker = ChaosBroker(tmp_path)
    await broker.start()
    yield broker
    await broker.close()


@pytest.fixture
async def url(broker: ChaosBroker, tmp_path: Path) -> AsyncIterator[str]:
    """Of one Sentinel, which watches the broker."""
    port = free_port()
    path = tmp_path / "sentinel.conf"
    path.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {broker.port} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} 500\nsentinel failover-timeout {SERVICE} 3000\n"
    )
    command = [server_binary(), str(path), "--sentinel"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    url = f"redis+sentinel://127.0.0.1:{port}/{SERVICE}/0"
    await _eventually(lambda: _is_primary(url, broker.port))
    yield url
    process.kill()
    await process.wait()


async def test_primary_is_found_again_after_a_failover(broker: ChaosBroker, url: str):
    client = open_redis(url)
    await client.set("key", "before")
    async with Subscriber(url) as subscriber:
        messages = subscriber.subscribe("channel")
        await messages.wait()
        assert messages.must_look, "the broker has confirmed"
        messages.must_look = False
        await broker.redis.publish("channel", "one")
        await messages.wait()
        assert messages.take() == [b"one"]
        await broker.add_replica()
        old = broker.port
        sentinel = open_redis(f"redis://127.0.0.1:{SentinelSet.parse(url).hosts[0][1]}")
        await _eventually(lambda: _has_replica(sentinel))
        await sentinel.aclose()
        broker.kill()
        await _eventually(lambda: _is_not_primary(url, old))
        await messages.wait()
        assert messages.must_look, "connected anew, to the other server"
    await _eventually(lambda: _holds(client, "key", b"before"))
    await client.aclose()


async def _eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Nothing announces what a Sentinel thinks."""
    while True:
        with suppress(RedisError, OSError):
            if await condition():
                return
        await asyncio.sleep(0.05)


async def _is_primary(url: str, port: int) -> bool:
    return (await SentinelSet.parse(url).primary())[1] == port


async def _is_not_primary(url: str, port: int) -> bool:
    return not await _is_primary(url, port)


async def _has_replica(sentinel: Redis) -> bool:
    return bool(await sentinel.execute_command("SENTINEL", "REPLICAS", SERVICE))


async def _holds(client: Redis, key: str, value: bytes) -> bool:
    return await client.get(key) == value


def test_urls():
    found = SentinelSet.parse("rediss+sentinel://me:p%40ss@one:1,two/name/3")
    assert found == SentinelSet((("one", 1), ("two", 26379)), "name", 3, "me", "p@ss", True)
    assert "p@ss" not in repr(found)
    assert SentinelSet.parse("redis://one") is None
    with pytest.raises(ValueError, match="redis\\+sentinel://host"):
        SentinelSet.parse("redis+sentinel://one")
