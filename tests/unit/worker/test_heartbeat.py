"""A worker that decodes keeps its lease however long a step takes; one that hangs does not."""

import asyncio
import logging
import time

import pytest

from common.messages import ModelCard
from common.worker_registry import WorkerStatus
from worker.service.lease import Heartbeat

CARD = ModelCard("m", 10, 20, 30, "digest")


class Registry:
    """Tells of each beat."""

    def __init__(self) -> None:
        self.beaten = asyncio.Event()

    async def beat(self, card: ModelCard, status: WorkerStatus, *, lease_s: float) -> bool:
        self.beaten.set()
        return True


class Told(logging.Handler):
    """Tells of each log record."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


def a_heartbeat(registry: Registry, *, step_s: float | None) -> Heartbeat:
    """Of a worker whose step has run for `step_s`; None is idle."""
    started_s = None if step_s is None else time.monotonic() - step_s
    return Heartbeat(
        registry,
        CARD,
        b"{}",
        lease_s=0.02,
        step_timeout_s=60.0,
        status=lambda: WorkerStatus("w", "m"),
        busy_since_s=lambda: started_s,
    )


@pytest.mark.parametrize("step_s", [None, 0.0, 30.0])
async def test_lease_is_kept_while_a_step_runs(step_s: float | None):
    registry = Registry()
    beating = asyncio.create_task(a_heartbeat(registry, step_s=step_s).run())
    async with asyncio.timeout(5):
        await registry.beaten.wait()
    beating.cancel()


async def test_hung_step_gives_the_lease_up():
    registry, told = Registry(), Told()
    logger = logging.getLogger("worker.service.lease")
    logger.addHandler(told)
    try:
        beating = asyncio.create_task(a_heartbeat(registry, step_s=61.0).run())
        async with asyncio.timeout(5):
            await told.event.wait()
        beating.cancel()
    finally:
        logger.removeHandler(told)
    assert not registry.beaten.is_set()
