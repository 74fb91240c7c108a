"""Pulls requests from the queue as fast as the scheduler has room, while the engine runs."""

import asyncio
import logging
import time

from redis.exceptions import RedisError

from common.errors import FleetError, Unavailable
from common.lua import TRANSIENT
from common.request_queue import Entry, Lease, RequestQueue
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.service.outage import Outage
from worker.service.output import OutputProcessor
from worker.service.publisher import Publisher

logger = logging.getLogger(__name__)

_PAUSE_S = 0.2
_LOOK_BACK_S = 1.0  # how often to look for entries whose delivery we never heard of
_RESTORE_S = 1.0  # what gateways get to give back what a restarted broker lost
_TRIAL_LOOK_S = 0.02


class Intake:
    """Turns queue entries into sequences of the scheduler. One blocking reader: a request arrives without polling."""

    def __init__(
        self,
        queue: RequestQueue,
        worker_id: str,
        scheduler: Scheduler,
        processor: OutputProcessor,
        publisher: Publisher,
        *,
        decoder_start_token: int | None = None,
    ) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._scheduler = scheduler
        self._processor = processor
        self._publisher = publisher
        self._decoder_start_token = decoder_start_token
        self._is_closed = False
        self._has_room = asyncio.Event()
        self._has_work = asyncio.Event()
        self._has_group = True
        self._broker_run = ""
        self._is_run_known = False
        self._look_back_at_s = 0.0
        self.num_leases = 0

    async def run(self) -> None:
        """Fetch and lease until cancelled."""
        outage = Outage(
            logger, "the broker does not answer, trying again", over="the broker answers"
        )
        while True:
            if self._scheduler.room <= 0:
                self._has_room.clear()
                await self._has_room.wait()
            try:
                if not self._is_run_known:
                    await self._mind_restart()
                if not self._has_group:  # the broker was wiped
                    await self._queue.create_group()
                    self._has_group = True
                await self._fetch(self._scheduler.room)
                outage.succeeded()
            except (*TRANSIENT, Unavailable) as error:
                outage.failed(error)
                self._is_run_known = False
                await asyncio.sleep(_PAUSE_S)
            except RedisError as error:
                if "NOGROUP" not in str(error):
                    raise
                self._has_group = False

    async def wait_for_work(self) -> None:
        """Return when the scheduler or the publisher has something to do, or when `close` was called."""
        while not (self._scheduler.has_work or self._publisher.has_unsent or self._is_closed):
            self._has_work.clear()
            await self._has_work.wait()

    def close(self) -> None:
        """Let nobody wait for work any more."""
        self._is_closed = True
        self._has_work.set()

    def step_done(self) -> None:
        """Room may have come free."""
        if self._scheduler.room > 0:
            self._has_room.set()

    async def lease(self, entries: list[Entry]) -> None:
        """Take the requests behind delivered entries, as far as they are still to be run.

        A suspect is tried alone, between requests that have told a token: if it ends this worker, that counts
        against no other.
        """
        for entry in entries:
            if entry.is_suspect:
                await self._until_all_are_tried()
                await self._lease([entry])
        if any(entry.is_suspect for entry in entries):
            await self._until_all_are_tried()
        await self._lease([entry for entry in entries if not entry.is_suspect])

    async def _lease(self, entries: list[Entry]) -> None:
        for lease in await self._queue.lease(self._worker_id, entries):
            self.num_leases += 1
            self.add(lease)

    async def _until_all_are_tried(self) -> None:
        while self._publisher.num_untried:
            await asyncio.sleep(_TRIAL_LOOK_S)  # rare enough to poll

    def add(self, lease: Lease) -> None:
        """Give a leased request to the scheduler; one that was begun elsewhere goes to the front."""
        sequence = Sequence.from_journal(
            lease.request,
            lease.frames,
            decoder_start_token=self._decoder_start_token,
            lease_token=lease.token,
            leased_at=time.monotonic(),
            waited_s=lease.waited_s,
        )
        self._publisher.open(sequence, lease)
        try:
            self._processor.start(sequence)
            self._scheduler.add(sequence, at_front=bool(lease.frames))
        except (
            FleetError
        ) as error:  # this worker can not run it: its client is told, the others live on
            self._publisher.fail(sequence, error)
        self._has_work.set()

    async def _mind_restart(self) -> None:
        """After a restart, let gateways give back lost frames before anybody begins a request without them."""
        run = await self._queue.broker_run()
        if self._broker_run and run != self._broker_run:
            await asyncio.sleep(_RESTORE_S)
        self._broker_run, self._is_run_known = run, True

    async def _look_back(self) -> None:
        """Lease what was delivered to us in a reply that was lost: while we live, nobody else may have it.

        Only between fetches, when no delivery is on its way from a reply to a lease.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._look_back_at_s:
            self._look_back_at_s = now + _LOOK_BACK_S
            known = self._publisher.entries
            await self.lease(await self._queue.delivered(self._worker_id, known=known))

    async def _fetch(self, room: int) -> None:
        """Lease what waits, highest priority first and no more than there is room for; wait where nothing does."""
        await self._look_back()
        entries = await self._queue.fetch(self._worker_id, count=room)
        await self.lease(entries or await self._queue.wait(self._worker_id))
        await asyncio.sleep(0)  # the step begins before the next look
