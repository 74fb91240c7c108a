"""The tools that break a broker from outside do what they say: otherwise the rows of the matrix that use them prove nothing."""

import asyncio
import random
import time
from pathlib import Path

import pytest

from common.lua import until_answered
from common.redis_client import BrokerRefuses
from tests.chaos.servers import ChaosBroker

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]


@pytest.fixture
async def broker(tmp_path: Path):
    broker = ChaosBroker(tmp_path)
    await broker.start()
    yield broker
    await broker.close()


async def count_until_refused(broker: ChaosBroker) -> None:
    while True:
        await broker.redis.incr("counter")


async def test_clock_of_a_running_broker_is_set(broker: ChaosBroker):
    async def difference_s() -> float:
        seconds, _ = await broker.redis.time()
        return seconds - time.time()

    await broker.redis.set("key", "value", px=60_000)
    for shift_s in (3600, -3600, 0):
        broker.shift_clock(shift_s)
        while await difference_s() != pytest.approx(shift_s, abs=2):
            await asyncio.sleep(0.01)  # the broker does not look at its clock for every command
    broker.shift_clock(3600)
    while await broker.redis.get("key") is not None:
        await asyncio.sleep(0.01)


async def test_crash_with_a_slow_disk_loses_acknowledged_writes(broker: ChaosBroker):
    broker.slow_down_sync(3.0)
    started, value = time.monotonic(), 0
    while time.monotonic() < started + 2.5:
        value = await broker.redis.incr("counter")
    broker.restart()
    kept = await until_answered(lambda: broker.redis.get("counter"), patience_s=5)
    assert int(kept or 0) < value


async def test_full_disk_is_a_refusal_that_passes(broker: ChaosBroker):
    value = await broker.redis.incr("counter")
    filling = asyncio.create_task(broker.fill_disk(2.0))
    with pytest.raises(BrokerRefuses, match="MISCONF"):
        await count_until_refused(broker)
    await filling
    async with asyncio.timeout(5):
        while True:
            try:
                assert await broker.redis.incr("counter") > value
                break
            except BrokerRefuses:
                await asyncio.sleep(0.05)  # it tries its disk again once a second


async def test_failover_loses_what_the_replica_had_not(broker: ChaosBroker):

    await broker.redis.set("before", 1)
    await broker.add_replica()
    old = broker.redis
    failing_over = asyncio.create_task(broker.fail_over(random.Random(1)))
    while (await old.info("replication"))["connected_slaves"]:
        await asyncio.sleep(0.002)
    await old.set("lost", 1)
    await failing_over
    assert await broker.redis.get("before") == b"1"
    assert await broker.redis.get("lost") is None
