"""Opens clients of the broker. The settings here are the result of measurements: see the comments before changing one."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.errors import Unavailable
from common.wire import BrokerAddress, SharedWire

logger = logging.getLogger(__name__)

OLDEST_VERSION = (7, 0)
BLOCK_MS = 1000  # longest wait of a blocking read; must stay below the socket timeout, which it does not extend
_SOCKET_TIMEOUT_S = 3.0
# Longer than those before it can take: who finds no connection for so long has a broker that does not answer.
_POOL_TIMEOUT_S = 2 * _SOCKET_TIMEOUT_S
_SILENT_S = 2.0  # a broker that starts together with us is there by then
_BLOCKING = frozenset(("XREADGROUP",))  # on a shared connection all else would wait for its reply
# What a broker says that cannot write now but will again: its disk is full, its replicas are away, a script runs.
_PASSING = ("MISCONF", "NOREPLICAS", "BUSY ")


class BrokerRefuses(ResponseError):
    """The broker answers, but takes no writes for the moment."""


class LeanRedis(Redis):
    """redis-py's commands on a connection of ours. What blocks, and pipelines, take one of redis-py's pool."""

    wire: SharedWire

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        options.pop("keys", None)
        if args[0] in _BLOCKING or options:
            return await self._execute_alone(*args, **options)
        try:
            reply = await self.wire.call(_parts(args))
        except ResponseError as error:
            raise _passing(error) from error
        callback = self.response_callbacks.get(args[0])
        return reply if callback is None else callback(reply)

    async def _execute_alone(self, *args: Any, **options: Any) -> Any:
        """On a connection of the pool; one that fails closes itself, so that the pool opens it again."""
        connection = await self.connection_pool.get_connection()
        try:
            await connection.send_command(*args)
            return await self.parse_response(connection, args[0], **options)
        finally:
            await self.connection_pool.release(connection)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await self.wire.close()
        await super().aclose(close_connection_pool)


class _WaitingSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that Sentinels name; whoever finds all of them in use waits for one."""


def open_redis(url: str, *, max_connections: int = 64) -> Redis:
    """A client of the broker at `url` (redis://, rediss://, unix:// or redis+sentinel://); replies are bytes.

    No built-in retries: redis-py would send a command again that is not idempotent. RESP2, because RESP3 costs a
    quarter more on the receiving side. Whoever finds all `max_connections` in use waits for one.

    Raises BrokerUrlError.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 1.0,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": max_connections,
        "timeout": _POOL_TIMEOUT_S,
    }
    address = BrokerAddress.parse(url)
    if address.sentinels:
        kinds = {"connection_pool_class": _WaitingSentinelPool}
        client = address.sentinels.client(LeanRedis, **kinds, **options)
    else:
        client = LeanRedis.from_pool(BlockingConnectionPool.from_url(url, **options))
    client.wire = SharedWire(address, timeout_s=_SOCKET_TIMEOUT_S)
    pool = client.connection_pool
    pool.connection_class = _lean(pool.connection_class)
    return client


def _lean(base: type[AbstractConnection]) -> type[AbstractConnection]:
    """A connection class that packs commands in C and writes them at once.

    redis-py packs in Python, and gives each write a task of its own for the sake of its timeout. Only what does not fit
    into the socket's buffer needs that. Writing to a connection that was cut is a ConnectionError: uvloop raises
    RuntimeError there, which nobody would take for a lost connection.
    """

    class LeanConnection(base):
        def pack_command(self, *args: Any) -> list[bytes]:
            return [hiredis.pack_command(_parts(args))]

        def pack_commands(self, commands: Iterable[Sequence[Any]]) -> list[bytes]:
            return [b"".join(hiredis.pack_command(_parts(args)) for args in commands)]

        async def send_packed_command(
            self, command: Iterable[bytes], check_health: bool = True
        ) -> None:
            if not self.is_connected:
                await self.connect_check_health(check_health=False)
            try:
                self._writer.writelines(command)
                if self._writer.transport.get_write_buffer_size():
                    async with asyncio.timeout(self.socket_timeout):
                        await self._writer.drain()
            except BaseException as error:  # what was sent of it cannot be known
                await self.disconnect(nowait=True)
                if isinstance(error, TimeoutError):
                    raise RedisTimeoutError("the broker does not read") from error
                if isinstance(error, RuntimeError | OSError):
                    raise ConnectionError(f"the connection was closed: {error}") from error
                raise

        async def read_response(self, *arguments: Any, **options: Any) -> Any:
            try:
                return await super().read_response(*arguments, **options)
            except ResponseError as error:
                raise _passing(error) from error

    return LeanConnection


def _parts(args: Sequence[Any]) -> tuple[Any, ...]:
    """What goes over the wire: redis-py's names of commands may be of two words."""
    name, *rest = args
    return (*name.split(), *rest) if " " in name else tuple(args)


def _passing(error: ResponseError) -> ResponseError:
    """A BrokerRefuses, if that is what the error says."""
    return BrokerRefuses(str(error)) if str(error).startswith(_PASSING) else error


async def wait_for_redis(redis: Redis, *, timeout_s: float) -> None:
    """Return once the broker answers; says once that it waits.

    Raises Unavailable after `timeout_s`, or at once when the broker is too old.
    """
    loop = asyncio.get_running_loop()
    started_at, has_said = loop.time(), False
    while True:
        try:
            _check_version(await redis.info("server"))
            return
        except (ConnectionError, RedisTimeoutError, BusyLoadingError, OSError) as error:
            waited_s = loop.time() - started_at
            if waited_s > timeout_s:
                raise Unavailable(
                    f"no broker answered within {timeout_s:.0f} s ({error}); start one or check --redis-url"
                ) from error
            if waited_s > _SILENT_S and not has_said:
                logger.warning("waiting for the broker, at most %.0f s: %s", timeout_s, error)
                has_said = True
        await asyncio.sleep(0.05)


def _check_version(server: dict) -> None:
    found = str(server.get("valkey_version") or server.get("redis_version"))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_VERSION:
        raise Unavailable(f"the broker is version {found}; use Redis 7.0 or newer, or Valkey")
