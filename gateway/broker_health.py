"""Whether the broker can take new requests, as it was about a second ago. Those that run need no permission.

Refusing at 80 % of its memory leaves room for the journals of what was admitted: a full broker holds all streams up.
"""

import asyncio
import logging

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.errors import Overloaded, Unavailable

logger = logging.getLogger(__name__)

_REFRESH_S = 1.0
_FULL_SHARE = 0.8


class BrokerHealth:
    """`run()` keeps it fresh; `check` reads memory only."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._is_reachable = True
        self._memory_share = 0.0  # of `maxmemory`; 0 without a limit

    def check(self) -> None:
        """Raises Unavailable without a broker, and Overloaded when it has little memory left."""
        if not self._is_reachable:
            raise Unavailable("The service cannot answer right now: the broker does not answer")
        if self._memory_share >= _FULL_SHARE:
            raise Overloaded(retry_after_s=2)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(_REFRESH_S)

    async def refresh(self) -> None:
        """Ask the broker once."""
        try:
            memory = await self._redis.info("memory")
        except (RedisError, OSError, TimeoutError):
            self._is_reachable = False
            return
        self._is_reachable = True
        limit = int(memory.get("maxmemory", 0))
        share = int(memory["used_memory"]) / limit if limit else 0.0
        if (share >= _FULL_SHARE) != (self._memory_share >= _FULL_SHARE):
            word = "refuses" if share >= _FULL_SHARE else "takes"
            logger.warning("the gateway %s requests: broker memory %.0f %%", word, share * 100)
        self._memory_share = share
