"""Keeps what this worker holds, and takes over what dead workers held.

A heartbeat is tied to progress: a step that takes longer than `--step-timeout-s` is a hang, and then somebody else may
have the requests. That is safe at any time, because Redis refuses the frames of whoever lost a lease.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from common.errors import Unavailable
from common.lua import TRANSIENT
from common.messages import ModelCard
from common.request_queue import RequestQueue
from common.worker_registry import WorkerRegistry, WorkerStatus

logger = logging.getLogger(__name__)

_BEATS_PER_LEASE = 4


class Heartbeat:
    """Says every quarter of a lease that this worker lives, unless it hangs."""

    def __init__(
        self,
        registry: WorkerRegistry,
        card: ModelCard,
        tokenizer: bytes,
        *,
        lease_s: float,
        step_timeout_s: float,
        status: Callable[[], WorkerStatus],
        busy_since_s: Callable[[], float | None],
    ) -> None:
        self._registry = registry
        self._card = card
        self._tokenizer = tokenizer
        self._lease_s = lease_s
        self._step_timeout_s = step_timeout_s
        self._status = status
        self._busy_since_s = busy_since_s

    async def announce(self) -> None:
        """Publish the model and this worker. From here on gateways send requests."""
        await self._registry.announce(self._card, self._tokenizer)
        await self.beat()

    async def beat(self) -> None:
        is_known = await self._registry.beat(self._card, self._status(), lease_s=self._lease_s)
        if not is_known:  # the broker was wiped
            await self._registry.announce(self._card, self._tokenizer)

    async def retire(self) -> None:
        """Take this worker out of the registry."""
        await self._registry.retire(self._card.model, self._status().id)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await asyncio.sleep(self._lease_s / _BEATS_PER_LEASE)
            if self._is_hanging():
                logger.error("a step takes longer than the step timeout, heartbeat withheld")
                continue
            try:
                await self.beat()
            except (*TRANSIENT, RedisError) as error:
                logger.warning("heartbeat not written", extra={"error": str(error)})

    def _is_hanging(self) -> bool:
        since_s = self._busy_since_s()
        return since_s is not None and time.monotonic() - since_s > self._step_timeout_s


class Reaper:
    """Puts back what workers without a heartbeat hold. Every worker runs one; doing it twice is harmless.

    After a restart of the broker it waits for one lease: until then heartbeats may be missing of workers that live,
    and gateways give back the frames that the broker lost.
    """

    def __init__(self, queue: RequestQueue, *, lease_s: float) -> None:
        self._queue = queue
        self._lease_s = lease_s
        self._broker_run = ""
        self._begin_at_s = 0.0

    async def run(self) -> None:
        """Reap about five times a lease until cancelled: a look is cheap, and somebody waits for each dead worker."""
        while True:
            await asyncio.sleep(self._lease_s * random.uniform(0.1, 0.3))
            try:
                num_revoked = await self.reap()
            except (*TRANSIENT, RedisError, Unavailable) as error:
                logger.warning("could not look for abandoned requests", extra={"error": str(error)})
                continue
            if num_revoked:
                logger.warning(
                    "took over requests of a dead worker", extra={"requests": num_revoked}
                )

    async def reap(self) -> int:
        """Look once; the number of requests put back."""
        now, run = asyncio.get_running_loop().time(), await self._queue.broker_run()
        if run != self._broker_run:
            self._begin_at_s = now + self._lease_s if self._broker_run else now
            self._broker_run = run
        if now < self._begin_at_s:
            return 0
        return await self._queue.revoke_abandoned()
