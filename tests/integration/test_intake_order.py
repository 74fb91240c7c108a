"""Which requests a worker that has little room takes from a queue where many wait."""

import asyncio

import pytest
from redis.asyncio import Redis

from common.redis_keys import ModelKeys
from common.request_queue import Lease, RequestQueue
from tests.requests import a_request
from worker.service.intake import Intake

pytestmark = pytest.mark.redis

ROOM = 2


class Scheduler:
    """Room for `ROOM`, and for one more whenever one ends."""

    has_work = True

    def __init__(self) -> None:
        self.running: list[Lease] = []

    @property
    def room(self) -> int:
        return ROOM - len(self.running)


class Publisher:
    """Knows what was leased and has not ended."""

    num_untried = 0
    has_unsent = False

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def entries(self) -> set[tuple[str, str]]:
        return {(lease.queue, lease.entry) for lease in self._scheduler.running}


class NotingIntake(Intake):
    """Its requests never run; they end when the test says so."""

    def __init__(self, queue: RequestQueue, scheduler: Scheduler) -> None:
        super().__init__(queue, "w", scheduler, None, Publisher(scheduler))
        self.priorities: list[int] = []
        self.most_at_once = 0

    def add(self, lease: Lease) -> None:
        self.priorities.append(lease.request.priority)
        self._scheduler.running.append(lease)
        self.most_at_once = max(self.most_at_once, len(self._scheduler.running))


async def test_a_class_waits_for_all_better_ones_and_no_more_than_there_is_room_for_is_taken(
    redis: Redis, keys: ModelKeys, deadline: None
):
    queue = RequestQueue(redis, keys)
    await queue.create_group()
    for priority in (2, 1, 0):
        for number in range(5):
            request = a_request(id=f"{priority}-{number}", priority=priority)
            await queue.enqueue(request, max_waiting=100)
    scheduler = Scheduler()
    intake = NotingIntake(queue, scheduler)
    running = asyncio.create_task(intake.run())
    while len(intake.priorities) < 15:
        while not scheduler.running:
            await asyncio.sleep(0)
        ended = scheduler.running.pop(0)
        await redis.xack(ended.queue, "workers", ended.entry)
        await redis.xdel(ended.queue, ended.entry)
        intake.step_done()
        while scheduler.room and len(intake.priorities) < 15:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert intake.priorities == [0] * 5 + [1] * 5 + [2] * 5
    assert intake.most_at_once == ROOM
