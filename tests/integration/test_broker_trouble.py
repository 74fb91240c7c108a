"""A broker that is away or full: what readers do, and what is refused."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from common.errors import Overloaded, Unavailable
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.subscriber import Subscriber
from common.token_journal import TokenJournal
from gateway.broker_health import BrokerHealth

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]


async def test_reader_holds_and_says_so_then_gives_up(tmp_path: Path):
    url, ticks = f"unix://{tmp_path}/none.sock", []
    redis = open_redis(url)

    async def tick() -> None:
        ticks.append(1)

    async with Subscriber(url) as subscriber:
        journal = TokenJournal(redis, ModelKeys("m"), subscriber, hold_s=0.3)
        async with journal.open("r1") as reader:
            reader.on_hold = tick
            with pytest.raises(Unavailable):
                await anext(reader)
    assert ticks == [1]
    await redis.aclose()


async def test_reader_can_be_stopped_while_it_holds(tmp_path: Path):
    url, is_holding = f"unix://{tmp_path}/none.sock", asyncio.Event()
    redis = open_redis(url)

    async def tick() -> None:
        is_holding.set()

    async with (
        Subscriber(url) as subscriber,
        TokenJournal(redis, ModelKeys("m"), subscriber).open("r1") as reader,
    ):
        reader.on_hold = tick
        reading = asyncio.create_task(anext(reader, None))
        await is_holding.wait()
        reader.stop()
        assert await reading is None
    await redis.aclose()


async def test_absent_broker_is_refused_without_asking_it(tmp_path: Path):
    redis = open_redis(f"unix://{tmp_path}/none.sock")
    health = BrokerHealth(redis)
    health.check()
    await health.refresh()
    with pytest.raises(Unavailable):
        health.check()
    await redis.aclose()


async def test_nearly_full_broker_takes_nothing_new(redis: Redis):
    health = BrokerHealth(redis)
    used = (await redis.info("memory"))["used_memory"]
    try:
        await redis.config_set("maxmemory", int(used / 0.85))
        await health.refresh()
        with pytest.raises(Overloaded) as refused:
            health.check()
        assert refused.value.retry_after_s >= 1
        await redis.config_set("maxmemory", used * 3)
        await health.refresh()
        health.check()
    finally:
        await redis.config_set("maxmemory", 0)
    await health.refresh()
    health.check()
