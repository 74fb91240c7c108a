"""A worker that decodes keeps its lease however long a step takes; one that hangs does not."""

import asyncio
import time

import pytest

from common.messages import ModelCard
from common.worker_registry import WorkerStatus
from worker.service.lease import Heartbeat, StepHangs

CARD = ModelCard("m", 10, 20, 30, "digest")


class Registry:
    """Tells of each beat."""

    def __init__(self) -> None:
        self.beaten = asyncio.Event()

    async def beat(self, card: ModelCard, status: WorkerStatus, *, lease_s: float) -> bool:
        self.beaten.set()
        return True


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


async def test_a_hung_step_gives_the_lease_up_and_then_ends_the_worker():
    registry = Registry()
    with pytest.raises(StepHangs, match=r"longer than `step_timeout_s`, 60 s"):
        async with asyncio.timeout(5):
            await a_heartbeat(registry, step_s=61.0).run()
    assert not registry.beaten.is_set()


async def test_a_step_that_ends_after_all_keeps_its_worker(caplog):
    registry, steps = Registry(), [time.monotonic() - 61.0, time.monotonic() - 62.0]
    heartbeat = a_heartbeat(registry, step_s=None)
    heartbeat._busy_since_s = lambda: steps.pop() if steps else None
    beating = asyncio.create_task(heartbeat.run())
    async with asyncio.timeout(5):
        await registry.beaten.wait()
    beating.cancel()
    assert caplog.messages == ["a step takes longer than the step timeout, heartbeat withheld"] * 2
