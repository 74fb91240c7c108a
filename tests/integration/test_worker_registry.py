"""What workers announce is what gateways read, and it goes away by itself."""

import time

import pytest
from redis.asyncio import Redis

from common.messages import ModelCard
from common.redis_keys import ModelKeys
from common.worker_registry import WorkerRegistry, WorkerStatus

pytestmark = pytest.mark.redis

CARD = ModelCard("m", 10, 20, 30, "abc", eos_tokens=(2,))
STATUS = WorkerStatus("w1", "m", slots=8, running=3, kv_used=0.25, tokens_per_s=12.5, version="1")


@pytest.fixture
def registry(redis: Redis) -> WorkerRegistry:
    return WorkerRegistry(redis)


async def test_model_is_announced(registry: WorkerRegistry):
    await registry.announce(CARD, b"{tokenizer}" * 1000)
    assert await registry.models() == ["m"]
    assert await registry.card("m") == CARD
    assert await registry.tokenizer("m", "abc") == b"{tokenizer}" * 1000
    assert await registry.card("other") is None and await registry.tokenizer("m", "x") is None


async def test_worker_is_seen_until_it_retires(registry: WorkerRegistry, redis: Redis):
    await registry.announce(CARD, b"{}")
    assert await registry.beat(CARD, STATUS, lease_s=5)
    assert await registry.beat(CARD, STATUS, lease_s=5)
    [seen] = await registry.workers("m")
    assert (seen.id, seen.slots, seen.running, seen.kv_used) == ("w1", 8, 3, 0.25)
    assert 0 < await redis.pttl(ModelKeys("m").heartbeat("w1")) <= 5000
    await registry.retire("m", "w1")
    assert await registry.workers("m") == []


async def test_beat_asks_for_a_new_announcement_after_a_wipe(
    registry: WorkerRegistry, redis: Redis
):
    await registry.announce(CARD, b"{}")
    await redis.flushall()
    assert not await registry.beat(CARD, STATUS, lease_s=5)


async def test_every_key_expires(registry: WorkerRegistry, redis: Redis):
    await registry.announce(CARD, b"{}")
    await registry.beat(CARD, STATUS, lease_s=5)
    for key in await redis.keys("*"):
        assert await redis.pttl(key) > 0 or key == b"fleet:models", key


async def test_clocks_of_other_machines_do_not_matter(
    registry: WorkerRegistry, monkeypatch: pytest.MonkeyPatch
):
    """A worker whose clock is an hour ahead is seen when it beats, not an hour later."""
    await registry.announce(CARD, b"{}")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    await registry.beat(CARD, STATUS, lease_s=5)
    monkeypatch.undo()
    [seen] = await registry.workers("m")
    assert seen.seen_s < 2
