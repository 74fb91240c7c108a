"""`tokenfleet queue` as an operator uses it."""

import asyncio
import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from redis.asyncio import Redis

from common.cli import main
from common.messages import ModelCard
from common.redis_keys import ModelKeys
from common.request_queue import MAX_STALLED, RequestQueue
from common.worker_registry import WorkerRegistry
from tests.requests import a_request

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

Command = Callable[..., "asyncio.Future[Result]"]


@pytest.fixture
def command(redis_url: str) -> Command:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["queue", "--redis-url", redis_url, *arguments])

    return lambda *arguments: asyncio.to_thread(run, *arguments)


@pytest.fixture
async def queue(redis: Redis, keys: ModelKeys) -> RequestQueue:
    await WorkerRegistry(redis).announce(ModelCard(keys.model, 10, 20, 256, "digest"), b"{}")
    queue = RequestQueue(redis, keys)
    await queue.create_group()
    return queue


async def poisoned(queue: RequestQueue, redis: Redis, keys: ModelKeys) -> str:
    """A request that was given up."""
    request = a_request(model=keys.model)
    await queue.enqueue(request, max_waiting=10)
    for number in range(MAX_STALLED + 1):
        worker = f"w{number}"
        await queue.lease(worker, await queue.fetch(worker, count=1))
        await queue.revoke_abandoned()
    assert await redis.hget(keys.request(request.id), "state") == b"failed"
    return request.id


async def test_depth(command: Command, queue: RequestQueue, keys: ModelKeys):
    for _ in range(3):
        await queue.enqueue(a_request(), max_waiting=10)
    await queue.lease("w1", await queue.fetch("w1", count=1))
    assert (await command("depth")).output == f"{keys.model}  waiting=2  running=1\n"


async def test_list_and_show(command: Command, queue, redis, keys: ModelKeys):
    request_id = await poisoned(queue, redis, keys)
    listed = (await command("dead-letters")).output
    assert request_id in listed and "reason=no progress" in listed and "worker=w2" in listed
    shown = json.loads((await command("dead-letters", "show", request_id)).output)
    assert shown["attempts"] == MAX_STALLED and shown["request"]["prompt_tokens"] == [5, 6, 7]
    unknown = await command("dead-letters", "show", "other")
    assert unknown.exit_code == 1 and "no dead letter of request other" in unknown.output


async def test_requeue(command: Command, queue: RequestQueue, redis, keys: ModelKeys):
    request_id = await poisoned(queue, redis, keys)
    assert (await command("dead-letters", "requeue", request_id)).exit_code == 0
    [lease] = await queue.lease("w9", await queue.fetch("w9", count=1))
    assert lease.request.id == request_id and lease.frames == ()
    assert (await command("dead-letters")).output == ""
    assert (await command("dead-letters", "requeue", request_id)).exit_code == 1


async def test_drop(command: Command, queue: RequestQueue, redis, keys: ModelKeys):
    request_id = await poisoned(queue, redis, keys)
    assert (await command("dead-letters", "drop", request_id)).exit_code == 0
    assert (await command("dead-letters")).output == ""
    assert (await queue.depth()).waiting == 0
