"""Opens clients of the broker. The settings here are the result of measurements: see the comments before changing one."""

import asyncio

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError

from common.errors import Unavailable

OLDEST_VERSION = (7, 0)
BLOCK_MS = 1000  # longest wait of a blocking read; must stay below the socket timeout, which it does not extend
_SOCKET_TIMEOUT_S = 3.0


def open_redis(url: str, *, max_connections: int = 64) -> Redis:
    """A client of the broker at `url` (redis://, rediss:// or unix://); replies are bytes.

    No built-in retries: redis-py would send a command again that is not idempotent. RESP2, because RESP3 costs a
    quarter more on the receiving side.
    """
    return Redis.from_url(
        url,
        protocol=2,
        decode_responses=False,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        max_connections=max_connections,
    )


async def wait_for_redis(redis: Redis, *, timeout_s: float) -> None:
    """Return once the broker answers.

    Raises Unavailable after `timeout_s`, or at once when the broker is too old.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + timeout_s
    while True:
        try:
            _check_version(await redis.info("server"))
            return
        except (ConnectionError, TimeoutError, BusyLoadingError, OSError) as error:
            if loop.time() > give_up_at:
                raise Unavailable(
                    f"no broker answered within {timeout_s:.0f} s ({error}); start one or check --redis-url"
                ) from error
        await asyncio.sleep(0.05)


def _check_version(server: dict) -> None:
    found = str(server.get("valkey_version") or server.get("redis_version"))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_VERSION:
        raise Unavailable(f"the broker is version {found}; use Redis 7.0 or newer, or Valkey")
