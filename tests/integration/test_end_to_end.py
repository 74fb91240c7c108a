"""Gateways, a queue and workers as separate processes, with the echo model: HTTP in, tokens out."""

import asyncio
import signal

import aiohttp
import pytest
from redis.asyncio import Redis

from common.redis_keys import ModelKeys
from common.worker_registry import WorkerRegistry
from tests.fleet import Fleet, generate, place_of, stream

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("long_deadline")]

TEXT = "The quick brown fox jumps over the lazy dog. "


async def test_both_routes_tell_the_same_text(fleet: Fleet, session: aiohttp.ClientSession):
    await fleet.worker()
    url = await fleet.gateway()
    whole = await generate(session, url, TEXT, max_new_tokens=200, details=True)
    events = [event async for event in stream(session, url, TEXT, max_new_tokens=200)]
    assert whole["generated_text"] == TEXT
    assert whole["details"]["finish_reason"] == "eos_token"
    assert events[-1][1]["generated_text"] == TEXT
    visible = (event["token"] for _, event in events if not event["token"]["special"])
    assert "".join(token["text"] for token in visible) == TEXT
    assert [place_of(event_id) for event_id, _ in events] == list(range(len(events)))


async def test_two_workers_and_two_gateways_share_the_load(fleet: Fleet, session, redis: Redis):
    await asyncio.gather(
        *(fleet.worker("--echo-delay-ms", "2", "--max-batch-size", "4") for _ in "ab")
    )
    urls = await asyncio.gather(fleet.gateway(), fleet.gateway())
    answers = await asyncio.gather(
        *(generate(session, urls[n % 2], f"{n} {TEXT}", max_new_tokens=40) for n in range(32))
    )
    for number, answer in enumerate(answers):
        assert answer["generated_text"] == f"{number} {TEXT}"[:40]
    owners = {
        await redis.hget(key, "worker") async for key in redis.scan_iter("fleet:{echo}:request:*")
    }
    assert len(owners) == 2, "both workers had requests"


async def test_worker_started_under_load_takes_requests(fleet: Fleet, session, redis: Redis):
    await fleet.worker("--echo-delay-ms", "5", "--max-batch-size", "2", "--lease-s", "1")
    url = await fleet.gateway()
    load = [
        asyncio.create_task(generate(session, url, f"{n} {TEXT}", max_new_tokens=30))
        for n in range(40)
    ]
    await load[0]
    await fleet.worker("--echo-delay-ms", "5", "--max-batch-size", "8", "--lease-s", "1")
    started = asyncio.get_running_loop().time()
    registry = WorkerRegistry(redis)
    while sum(status.running > 0 for status in await registry.workers("echo")) < 2:
        await asyncio.sleep(0.05)  # the registry has no channel to wait on
    assert asyncio.get_running_loop().time() - started < 2
    await asyncio.gather(*load)


async def test_client_that_leaves_frees_the_worker(fleet: Fleet, session, redis: Redis):
    await fleet.worker("--echo-delay-ms", "5", "--max-batch-size", "1")
    url = await fleet.gateway()
    leaving = stream(session, url, TEXT * 20, max_new_tokens=900)
    await anext(leaving)
    waiting = asyncio.create_task(generate(session, url, "next", max_new_tokens=4))
    await leaving.aclose()
    async with asyncio.timeout(3):  # the first one alone would have taken more
        assert (await waiting)["generated_text"] == "next"
    states = [
        await redis.hget(key, "state") async for key in redis.scan_iter("fleet:{echo}:request:*")
    ]
    assert sorted(states) == [b"cancelled", b"finished"]


async def test_worker_killed_in_mid_stream_is_replaced(
    fleet: Fleet, session: aiohttp.ClientSession
):
    first = await fleet.worker("--echo-delay-ms", "20", "--lease-s", "1")
    url = await fleet.gateway()
    events = stream(session, url, TEXT, max_new_tokens=60)
    received = [await anext(events) for _ in range(5)]
    await first.stop(signal.SIGKILL)
    await fleet.worker("--lease-s", "1")
    received += [event async for event in events]
    assert [place_of(event_id) for event_id, _ in received] == list(range(len(received)))
    assert received[-1][1]["generated_text"] == TEXT


async def test_stopped_worker_hands_its_streams_over(fleet: Fleet, session: aiohttp.ClientSession):
    first = await fleet.worker("--echo-delay-ms", "20")
    url = await fleet.gateway()
    events = stream(session, url, TEXT, max_new_tokens=60)
    received = [await anext(events) for _ in range(5)]
    await fleet.worker("--echo-delay-ms", "1")
    assert await first.stop() == 0
    received += [event async for event in events]
    assert [place_of(event_id) for event_id, _ in received] == list(range(len(received)))
    assert received[-1][1]["generated_text"] == TEXT


async def test_every_key_expires(fleet: Fleet, session, redis: Redis):
    await fleet.worker()
    url = await fleet.gateway()
    await generate(session, url, TEXT, max_new_tokens=4)
    lasting = {ModelKeys("echo").queue(n).encode() for n in range(3)} | {b"fleet:models"}
    lasting.add(ModelKeys("echo").resume_queue.encode())
    for key in await redis.keys("*"):
        assert key in lasting or await redis.pttl(key) > 0, key
