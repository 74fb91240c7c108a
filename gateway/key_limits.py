"""What an API key may use at once and in a minute, counted in the broker: the limits hold for all gateways together.

A request is let in while its key has budget left, and pays when it has ended, for what it was: a budget may go below
zero, and then the key waits until it has filled up again. Knows no HTTP.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from redis.exceptions import RedisError

from common.errors import FleetError, RateLimited, Unavailable
from common.lua import Scripts
from common.redis_keys import TenantKeys
from gateway.api_keys import ApiKey

logger = logging.getLogger(__name__)

HOLD_MS = 60_000  # after which the requests of a gateway that died count no more
_REFRESH_S = HOLD_MS / 3000


class KeyLimits:
    """The requests of limited keys that this process holds open. `run()` keeps them counted."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._open: dict[str, set[str]] = {}  # ids by the key's name
        self._settling: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def held(self, key: ApiKey, cost: Callable[[], int]) -> AsyncIterator[None]:
        """Hold one of the key's requests open; at the end it pays `cost()` tokens.

        Raises RateLimited, and Unavailable without a broker.
        """
        if not key.is_limited:
            yield
            return
        ticket = uuid.uuid4().hex
        await self._admit(key, ticket)
        self._open.setdefault(key.name, set()).add(ticket)
        try:
            yield
        finally:
            # in a task of its own: the task of the request may be ending because it was cancelled itself
            task = asyncio.create_task(self._settle(key, ticket, cost()), name="settle-key")
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def run(self) -> None:
        """Tell the broker for ever what is still open."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            for name, tickets in list(self._open.items()):
                try:
                    await self._scripts.run("hold", [TenantKeys(name).open], [HOLD_MS, *tickets])
                except (FleetError, RedisError) as error:
                    logger.warning("could not note the open requests of a key: %s", error)

    async def close(self) -> None:
        """Wait until everything that ended is paid."""
        await asyncio.gather(*self._settling)

    async def _admit(self, key: ApiKey, ticket: str) -> None:
        keys = TenantKeys(key.name)
        most, per_minute = key.max_concurrent_requests or 0, key.max_tokens_per_minute or 0
        limits = [ticket, most, per_minute, HOLD_MS]
        try:
            answer, *rest = await self._scripts.run("admit", [keys.open, keys.budget], limits)
        except RedisError as error:
            raise Unavailable(f"the broker refused the request: {error}") from error
        if answer == b"OPEN":
            raise RateLimited(
                f"The key `{key.name}` may have {most} requests open at once, and has as many"
            )
        if answer == b"TOKENS":
            wait_s = -(-rest[0] // 1000)
            raise RateLimited(
                f"The key `{key.name}` may use {per_minute} tokens a minute, and has used them; "
                f"try again in {wait_s} s",
                retry_after_s=wait_s,
            )

    async def _settle(self, key: ApiKey, ticket: str, tokens: int) -> None:
        keys = TenantKeys(key.name)
        tickets = self._open[key.name]
        tickets.discard(ticket)
        if not tickets:
            del self._open[key.name]
        usage = [ticket, tokens, key.max_tokens_per_minute or 0]
        try:
            await self._scripts.run("settle", [keys.open, keys.budget], usage)
        except (FleetError, RedisError) as error:
            logger.warning("%d tokens of a key were not counted: %s", tokens, error)
