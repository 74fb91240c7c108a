"""A step that never ends: its worker does not stand in the way, neither alive nor when it is told to stop."""

import asyncio
import signal

import pytest
from redis.asyncio import Redis

from common.redis_keys import ModelKeys
from common.request_queue import RequestQueue
from common.token_journal import TokenJournal
from tests.fleet import Fleet, Process
from tests.requests import a_request

pytestmark = pytest.mark.redis

KEYS = ModelKeys("echo")
FOR_EVER_MS = "1e9"


@pytest.fixture
async def queue(redis: Redis) -> RequestQueue:
    return RequestQueue(redis, KEYS)


async def a_hanging_worker(
    fleet: Fleet, queue: RequestQueue, redis: Redis, *options: str
) -> Process:
    """It is in the step of a request `r`."""
    worker = await fleet.worker("--echo-delay-ms", FOR_EVER_MS, "--lease-s", "0.8", *options)
    await queue.enqueue(a_request(id="r", model="echo"), max_waiting=10)
    while await redis.hget(KEYS.request("r"), "state") != b"running":
        await asyncio.sleep(0)
    return worker


async def test_its_worker_ends_and_another_one_goes_on(
    fleet: Fleet, queue: RequestQueue, redis: Redis, long_deadline: None
):
    hanging = await a_hanging_worker(fleet, queue, redis, "--step-timeout-s", "0.5")
    assert await hanging.process.wait() == 1
    assert "a step takes longer than `step_timeout_s`, 0.5 s" in "".join(hanging.lines)
    await fleet.worker("--lease-s", "0.8")
    journal = TokenJournal(redis, KEYS, subscriber=None)
    frames = []
    while not (frames and frames[-1].is_terminal):
        frames = await journal.read("r")
        await asyncio.sleep(0)
    assert frames[-1].finish


async def test_it_can_be_told_to_stop(
    fleet: Fleet, queue: RequestQueue, redis: Redis, long_deadline: None
):
    hanging = await a_hanging_worker(fleet, queue, redis, "--drain-s", "0.2")
    assert await hanging.stop(signal.SIGTERM) == 0
    assert await redis.hget(KEYS.request("r"), "state") == b"queued", "somebody else may have it"
