"""Ends requests that nobody reads any more: their gateway died, and no client came back."""

import asyncio
import logging
import random

from redis.exceptions import RedisError

from common.errors import Unavailable
from common.lua import TRANSIENT
from common.request_store import WATCH_TTL_S, RequestStore

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = WATCH_TTL_S / 4


class OrphanWatch:
    """Looks now and then for requests without a watcher. Every worker runs one; doing it twice is harmless."""

    def __init__(self, store: RequestStore, *, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s

    async def run(self) -> None:
        """Look until cancelled.

        A broker that was away may have forgotten who watches. Gateways tell it again, so the first look after an
        error, and after the start, comes late.
        """
        pause_s = WATCH_TTL_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.2))
            try:
                num_cancelled = await self._store.cancel_orphans(idle_s=self._lease_s)
            except (*TRANSIENT, RedisError, Unavailable) as error:
                logger.warning("could not look for orphans", extra={"error": str(error)})
                pause_s = WATCH_TTL_S
                continue
            pause_s = _LOOK_EVERY_S
            if num_cancelled:
                logger.warning("ended what nobody reads", extra={"requests": num_cancelled})
