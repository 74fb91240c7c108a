"""Ends requests that nobody reads any more: their gateway died, and no client came back."""

import asyncio
import logging
import random

from redis.exceptions import RedisError

from common.errors import Unavailable
from common.lua import TRANSIENT
from common.request_queue import WATCH_TTL_S
from common.request_store import RequestStore
from worker.service.outage import Outage

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = WATCH_TTL_S / 2  # longer than gateways take to renew


class OrphanWatch:
    """Looks now and then for requests without a watcher. Every worker runs one; doing it twice is harmless.

    It ends those that it finds twice in a row: between two looks a gateway that lives has renewed its watches.
    """

    def __init__(self, store: RequestStore) -> None:
        self._store = store

    async def run(self) -> None:
        """Look until cancelled.

        A broker that was away may have forgotten who watches. Gateways tell it again, so the first look after an
        error, and after the start, comes late.
        """
        pause_s, seen = WATCH_TTL_S, frozenset()
        outage = Outage(logger, "cannot look for orphans, trying again", over="looks for orphans")
        while True:
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.2))
            try:
                orphans = await self._store.look_for_orphans(seen=seen)
            except (*TRANSIENT, RedisError, Unavailable) as error:
                outage.failed(error)
                pause_s, seen = WATCH_TTL_S, frozenset()
                continue
            outage.succeeded()
            pause_s, seen = _LOOK_EVERY_S, orphans.unwatched
            if orphans.num_ended:
                logger.warning("ended what nobody reads", extra={"requests": orphans.num_ended})
