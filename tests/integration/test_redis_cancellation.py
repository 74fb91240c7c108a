"""A task that is cancelled inside a command ends, wherever in the command it is."""

import asyncio

import pytest

from common.redis_client import open_redis

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]


@pytest.mark.parametrize("is_connected", [False, True])
async def test_no_cancellation_is_swallowed(redis_url: str, is_connected: bool):
    for num_turns in range(20):
        redis = open_redis(redis_url)
        if is_connected:
            await redis.ping()
        task = asyncio.create_task(redis.lrange("list", 0, 1))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if task.cancel():  # False when it was done already
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await redis.ping(), "and the client is of use afterwards"
        await redis.aclose()
