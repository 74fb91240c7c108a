"""The watch for orphans while the broker is away."""

import asyncio

import pytest

from common.errors import Unavailable
from common.request_store import Orphans
from worker.service import orphans
from worker.service.orphans import OrphanWatch

pytestmark = pytest.mark.usefixtures("deadline")


async def test_an_outage_is_told_once_when_it_begins_and_once_when_it_ends(monkeypatch, caplog):
    monkeypatch.setattr(orphans, "WATCH_TTL_S", 0.0)
    monkeypatch.setattr(orphans, "_LOOK_EVERY_S", 0.0)
    answers = [Unavailable("away")] * 5 + [Orphans(frozenset(), 0)] * 3 + [Unavailable("away")] * 5
    is_over = asyncio.Event()

    class Store:
        async def look_for_orphans(self, *, seen):
            if not answers:
                is_over.set()
                await asyncio.Event().wait()
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    caplog.set_level("INFO")
    running = asyncio.create_task(OrphanWatch(Store()).run())
    await is_over.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING"]
