"""Tells the broker which requests this process holds a stream of, so that those nobody holds can be ended."""

import asyncio
import logging
import uuid
from collections.abc import Callable

from redis.exceptions import RedisError

from common.errors import Unavailable
from common.request_queue import WATCH_TTL_S
from common.request_store import RequestStore

logger = logging.getLogger(__name__)

_REFRESH_S = WATCH_TTL_S / 3


class Watches:
    """The streams that this process holds. `run()` notes new ones at once and renews all, in one round trip a model."""

    def __init__(self, open_store: Callable[[str], RequestStore]) -> None:
        self._open_store = open_store
        self._held: dict[str, tuple[str, str]] = {}  # watcher to (model, request id)
        self._new: list[str] = []
        self._has_new = asyncio.Event()

    def add(self, model: str, request_id: str, *, is_noted: bool) -> str:
        """Hold a stream; gives the watcher's name, for `release`.

        `is_noted`: whoever calls tells the broker, with the request that it enqueues.
        """
        watcher = uuid.uuid4().hex
        self._held[watcher] = (model, request_id)
        if not is_noted:
            self._new.append(watcher)
            self._has_new.set()
        return watcher

    def abandon(self, watcher: str) -> None:
        """Renew no more; the broker forgets the watcher after `WATCH_TTL_S`."""
        self._held.pop(watcher, None)

    async def release(self, watcher: str) -> int:
        """Give a stream up; the number of others, anywhere, that hold one of the same request."""
        model, request_id = self._held.pop(watcher)
        return await self._open_store(model).unwatch(request_id, watcher)

    async def run(self) -> None:
        """Renew for ever."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + _REFRESH_S
        while True:
            try:
                async with asyncio.timeout_at(renew_at):
                    await self._has_new.wait()
            except TimeoutError:
                renew_at = loop.time() + _REFRESH_S
                self._new = list(self._held)
            self._has_new.clear()
            watchers, self._new = self._new, []
            await self._note(watchers)

    async def _note(self, watchers: list[str]) -> None:
        by_model: dict[str, list[tuple[str, str]]] = {}
        for watcher in watchers:
            if watcher in self._held:
                model, request_id = self._held[watcher]
                by_model.setdefault(model, []).append((request_id, watcher))
        for model, rows in by_model.items():
            try:
                await self._open_store(model).watch(rows)
            except (Unavailable, RedisError) as error:
                logger.warning("could not note open streams, they are noted later: %s", error)
