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

from common.errors import FleetError, Unavailable
from common.lua import TRANSIENT
from common.messages import ModelCard
from common.request_queue import RequestQueue
from common.worker_registry import WorkerRegistry, WorkerStatus
from worker.service.outage import Outage

logger = logging.getLogger(__name__)

_BEATS_PER_LEASE = 4


class StepHangs(FleetError):
    """A step does not end, and nothing can end it but the end of its process."""


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
        self._hangs_since_s: float | None = None

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
        """Beat until cancelled. Raises StepHangs: a worker that cannot go on must make room for one that can."""
        outage = Outage(logger, "heartbeat not written", over="heartbeat written again")
        while True:
            await asyncio.sleep(self._lease_s / _BEATS_PER_LEASE)
            if self._is_hanging():
                continue
            try:
                await self.beat()
                outage.succeeded()
            except (*TRANSIENT, RedisError) as error:
                outage.failed(error)

    def _is_hanging(self) -> bool:
        """Whether to give the lease up. The step's last chance is the next beat: a process that was stopped for
        longer than the timeout is found here with a step that is about to end."""
        since_s = self._busy_since_s()
        if since_s is None or time.monotonic() - since_s <= self._step_timeout_s:
            return False
        if since_s == self._hangs_since_s:
            raise StepHangs(
                f"a step takes longer than `step_timeout_s`, {self._step_timeout_s:g} s, and cannot be ended otherwise; "
                "raise it if steps of this model may take so long"
            )
        self._hangs_since_s = since_s
        logger.error("a step takes longer than the step timeout, heartbeat withheld")
        return True


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
        outage = Outage(
            logger,
            "could not look for abandoned requests",
            over="abandoned requests are found again",
        )
        while True:
            await asyncio.sleep(self._lease_s * random.uniform(0.1, 0.3))
            try:
                num_revoked = await self.reap()
                outage.succeeded()
            except (*TRANSIENT, RedisError, Unavailable) as error:
                outage.failed(error)
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
