"""Limits of API keys against a real broker: they hold for all gateways together, and nothing is counted twice or forgotten."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from common.errors import RateLimited, Unavailable
from common.lua import Scripts
from common.redis_client import open_redis
from common.redis_keys import TenantKeys
from gateway import key_limits
from gateway.api_keys import ApiKey, line_for
from gateway.key_limits import KeyLimits
from tests.fleet import Fleet

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

WEB = TenantKeys("web")


def a_key(**limits: int) -> ApiKey:
    return ApiKey("web", b"", **limits)


@pytest.fixture
def limits(redis) -> KeyLimits:
    return KeyLimits(Scripts(redis))


async def use(limits: KeyLimits, key: ApiKey, tokens: int) -> None:
    async with limits.held(key, lambda: tokens):
        pass
    await limits.close()


async def test_as_many_at_once_as_the_key_may_have(limits, redis):
    other = KeyLimits(Scripts(redis))  # of another gateway
    key = a_key(max_concurrent_requests=2)
    async with limits.held(key, int), other.held(key, int):
        for one in (limits, other):
            with pytest.raises(
                RateLimited, match="`web` may have 2 requests open at once"
            ) as raised:
                await use(one, key, 0)
            assert raised.value.retry_after_s == 1
        await use(limits, ApiKey("else", b"", max_concurrent_requests=1), 0)
    await asyncio.gather(limits.close(), other.close())
    await use(limits, key, 0)
    assert await redis.zcard(WEB.open) == 0


async def test_tokens_are_paid_at_the_end_and_come_back_with_time(limits, redis):
    key = a_key(max_tokens_per_minute=60)
    await use(limits, key, 59)
    await use(limits, key, 120)  # one token was left, and nobody knew what it would become
    with pytest.raises(
        RateLimited, match="60 tokens a minute, and has used them; try again in"
    ) as r:
        await use(limits, key, 0)
    assert 115 <= r.value.retry_after_s <= 121
    assert await redis.pttl(WEB.budget) > 0
    at = int(await redis.hget(WEB.budget, "at"))
    await redis.hset(WEB.budget, "at", at - 125_000)  # two minutes and five seconds later
    await use(limits, key, 1)
    tokens = float(await redis.hget(WEB.budget, "tokens"))
    assert 2 < tokens < 6, "full speed of a token a second, less what was owed"


async def test_a_budget_never_holds_more_than_a_minute(limits, redis):
    key = a_key(max_tokens_per_minute=60)
    await use(limits, key, 1)
    await redis.hincrby(WEB.budget, "at", -3_600_000)
    await use(limits, key, 10)
    assert float(await redis.hget(WEB.budget, "tokens")) == 50


async def test_a_request_that_was_cancelled_pays_too(limits, redis):
    key, entered = a_key(max_tokens_per_minute=100), asyncio.Event()

    async def hang() -> None:
        async with limits.held(key, lambda: 40):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await entered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await limits.close()
    assert 60 <= float(await redis.hget(WEB.budget, "tokens")) < 61


async def test_settling_again_after_a_lost_reply_costs_nothing(limits, redis):
    keys = [WEB.open, WEB.budget]
    scripts = Scripts(redis)
    await scripts.run("admit", keys, ["t", 0, 100, 60_000])
    await scripts.run("admit", keys, ["t", 1, 100, 60_000])
    assert [await scripts.run("settle", keys, ["t", 30, 100]) for _ in range(2)] == [1, 0]
    assert float(await redis.hget(WEB.budget, "tokens")) == 70


async def test_what_a_dead_gateway_held_runs_out_and_what_lives_is_kept(limits, redis, monkeypatch):
    monkeypatch.setattr(key_limits, "HOLD_MS", 150)
    monkeypatch.setattr(key_limits, "_REFRESH_S", 0.03)
    key, dead = a_key(max_concurrent_requests=2), KeyLimits(Scripts(redis))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(limits.held(key, int))
        (alive,) = await redis.zrange(WEB.open, 0, -1)
        await stack.enter_async_context(dead.held(key, int))  # whose `run` does not run
        refreshing = asyncio.create_task(limits.run())
        while True:
            try:
                await use(limits, key, 0)
                break
            except RateLimited:
                await asyncio.sleep(0.01)  # nothing announces that time has passed
        assert await redis.zrange(WEB.open, 0, -1) == [alive]
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
    await asyncio.gather(limits.close(), dead.close())


async def test_keys_without_limits_need_no_broker():
    async with KeyLimits(None).held(a_key(), int):
        pass


async def test_no_broker(tmp_path, redis):
    client = open_redis(f"unix://{tmp_path}/none.sock")
    with pytest.raises(Unavailable):
        await use(KeyLimits(Scripts(client, patience_s=0.05)), a_key(max_concurrent_requests=1), 0)
    await client.aclose()


@asynccontextmanager
async def two_gateways(redis_url: str, keys_file) -> AsyncIterator[list[str]]:
    fleet = Fleet(redis_url)
    try:
        await fleet.worker("--echo-delay-ms", "5")
        options = ("--api-keys-file", str(keys_file))
        yield [await fleet.gateway(*options), await fleet.gateway(*options)]
    finally:
        await fleet.stop()


async def test_over_http(redis_url, tmp_path, redis):
    keys_file = tmp_path / "keys.toml"
    limited: Callable[[str, str], str] = lambda line, limit: line.replace(" }", f", {limit} }}")
    keys_file.write_text(
        limited(line_for("web", "w3b"), "max_concurrent_requests = 1")
        + "\n"
        + limited(line_for("batch", "b4tch"), "max_tokens_per_minute = 30")
    )
    async with (
        two_gateways(redis_url, keys_file) as (one, two),
        aiohttp.ClientSession() as session,
    ):

        async def post(url: str, path: str, key: str, body: dict) -> aiohttp.ClientResponse:
            headers = {"authorization": f"Bearer {key}"}
            return await session.post(f"{url}{path}", json=body, headers=headers)

        long = {"inputs": "a" * 500, "parameters": {"max_new_tokens": 500}}
        stream = await post(one, "/generate_stream", "w3b", long)
        refused = await post(two, "/generate", "w3b", {"inputs": "Hi"})
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        answer = await refused.json()
        assert answer["error_type"] == "rate_limited"
        assert "`web` may have 1 requests open" in answer["error"]
        stream.close()
        while (await post(two, "/generate", "w3b", {"inputs": "Hi"})).status == 429:
            await asyncio.sleep(0.02)  # until the broken connection was noticed

        body = {"inputs": "a" * 20, "parameters": {"max_new_tokens": 20, "ignore_eos_token": True}}
        assert (await post(one, "/generate", "b4tch", body)).status == 200
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        while (refused := await post(two, "/v1/chat/completions", "b4tch", chat)).status == 200:
            await asyncio.sleep(0.01)  # paid just behind the answer
        error = (await refused.json())["error"]
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "30 tokens a minute" in error["message"]
        async with session.get(f"{two}/metrics") as metrics:
            assert 'tokenfleet_key_refusals_total{key="batch"} 1.0' in await metrics.text()
