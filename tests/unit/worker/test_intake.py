"""What a worker takes when: suspects alone, and nothing at once after the broker has restarted."""

import asyncio
from collections import deque

import pytest
from redis.exceptions import ConnectionError

from common.request_queue import Entry
from worker.service import intake
from worker.service.intake import Intake

LIMIT_S = 5


class Queue:
    """Hands out what it is given, or raises it; notes what is leased together."""

    def __init__(self, *deliveries: list[Entry] | Exception) -> None:
        self.deliveries = deque(deliveries)
        self.runs = deque(["one"])
        self.leased: list[list[str]] = []
        self.waited_at: list[float] = []
        self.is_empty = asyncio.Event()

    async def broker_run(self) -> str:
        return self.runs.popleft() if len(self.runs) > 1 else self.runs[0]

    async def wait(self, worker: str) -> list[Entry]:
        self.waited_at.append(asyncio.get_running_loop().time())
        if not self.deliveries:
            self.is_empty.set()
            await asyncio.Event().wait()
        delivery = self.deliveries.popleft()
        if isinstance(delivery, Exception):
            raise delivery
        return delivery

    async def fetch(self, worker: str, *, count: int) -> list[Entry]:
        return []

    async def delivered(self, worker: str, *, known) -> list[Entry]:
        return []

    async def lease(self, worker: str, entries: list[Entry]) -> list:
        if entries:
            self.leased.append([entry.id for entry in entries])
        return []


class Publisher:
    """Says so often that requests have told nothing yet."""

    def __init__(self, queue: Queue, *, looks: int = 0) -> None:
        self.entries: set = set()
        self.num_leased_at_look: list[int] = []
        self._queue = queue
        self._looks = looks

    @property
    def num_untried(self) -> int:
        self.num_leased_at_look.append(len(self._queue.leased))
        return int(self.num_leased_at_look.count(len(self._queue.leased)) <= self._looks)


class Scheduler:
    room = 8
    has_work = False


async def take(queue: Queue, publisher: Publisher) -> None:
    """Let an intake run until the queue has nothing more."""
    running = asyncio.create_task(Intake(queue, "w", Scheduler(), None, publisher).run())
    async with asyncio.timeout(LIMIT_S):
        await queue.is_empty.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_suspects_are_tried_alone_and_first():
    entries = [
        Entry("q", "a", "1"),
        Entry("q", "b", "2", is_suspect=True),
        Entry("q", "c", "3", is_suspect=True),
        Entry("q", "d", "4"),
    ]
    queue = Queue(entries)
    publisher = Publisher(queue, looks=2)
    await take(queue, publisher)
    assert queue.leased == [["b"], ["c"], ["a", "d"]]
    assert publisher.num_leased_at_look == [0, 0, 0, 1, 1, 1, 2, 2, 2], "it waits for each"


@pytest.mark.parametrize(("runs", "waits"), [(["one", "two"], True), (["one", "one"], False)])
async def test_gateways_get_time_to_restore_what_a_restarted_broker_lost(
    monkeypatch: pytest.MonkeyPatch, runs: list[str], waits: bool
):
    monkeypatch.setattr(intake, "_RESTORE_S", 0.2)
    monkeypatch.setattr(intake, "_PAUSE_S", 0.0)
    queue = Queue(ConnectionError("gone"), [Entry("q", "a", "1")])
    queue.runs = deque(runs)
    await take(queue, Publisher(queue))
    lost_at, again_at, _ = queue.waited_at
    assert (again_at - lost_at >= 0.2) is waits
    assert queue.leased == [["a"]]
