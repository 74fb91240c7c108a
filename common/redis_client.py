"""Opens clients of the broker. The settings here are the result of measurements: see the comments before changing one."""

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError, TimeoutError

from common.errors import Unavailable
from common.sentinel import SentinelSet

OLDEST_VERSION = (7, 0)
BLOCK_MS = 1000  # longest wait of a blocking read; must stay below the socket timeout, which it does not extend
_SOCKET_TIMEOUT_S = 3.0
# What a broker says that cannot write now but will again: its disk is full, its replicas are away, a script runs.
_PASSING = ("MISCONF", "NOREPLICAS", "BUSY ")


class BrokerRefuses(ResponseError):
    """The broker answers, but takes no writes for the moment."""


class PlainRedis(Redis):
    """redis-py's client less what nobody here uses: retries, timings and error counts took half of a command's time.

    A connection that fails closes itself, so that the pool opens it again.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        connection = await self.connection_pool.get_connection()
        try:
            await connection.send_command(*args)
            return await self.parse_response(connection, args[0], **options)
        finally:
            await self.connection_pool.release(connection)


def open_redis(url: str, *, max_connections: int = 64) -> Redis:
    """A client of the broker at `url` (redis://, rediss://, unix:// or redis+sentinel://); replies are bytes.

    No built-in retries: redis-py would send a command again that is not idempotent. RESP2, because RESP3 costs a
    quarter more on the receiving side.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 1.0,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": max_connections,
    }
    sentinels = SentinelSet.parse(url)
    if sentinels:
        client = sentinels.client(PlainRedis, **options)
    else:
        client = PlainRedis.from_url(url, **options)
    pool = client.connection_pool
    pool.connection_class = told_of_its_end(pool.connection_class)
    return client


def told_of_its_end(base: type[AbstractConnection]) -> type[AbstractConnection]:
    """A connection class for which writing to a connection that was cut is a ConnectionError.

    uvloop raises RuntimeError there, which redis-py lets pass, and which nobody would take for a lost connection.
    It also hears of a cancellation that `asyncio.wait_for` swallows before Python 3.12, inside redis-py: without that,
    a task that is cancelled while it sends a command would go on. And a refusal that passes is a BrokerRefuses.
    """

    class ToldConnection(base):
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            task = asyncio.current_task()
            num_cancels = task.cancelling() if task else 0
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:
                await self.disconnect(nowait=True)
                raise ConnectionError(f"the connection was closed: {error}") from error
            if task and task.cancelling() > num_cancels:
                await self.disconnect(nowait=True)
                raise asyncio.CancelledError

        async def read_response(self, *arguments: Any, **options: Any) -> Any:
            try:
                return await super().read_response(*arguments, **options)
            except ResponseError as error:
                if str(error).startswith(_PASSING):
                    raise BrokerRefuses(str(error)) from error
                raise

    return ToldConnection


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
