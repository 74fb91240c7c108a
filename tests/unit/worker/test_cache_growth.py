"""The scheduler's cache takes memory from the machine only while there is some to spare."""

import pytest

from tests.scheduling import a_sequence
from worker.engine.plan import KvCacheLayout
from worker.engine.scheduler import Scheduler


@pytest.mark.parametrize(("has_memory", "expected"), [(False, 3), (True, 201)])
def test_prefixes_of_ended_requests(has_memory: bool, expected: int) -> None:
    layout = KvCacheLayout(num_blocks=1000, block_size=4, num_slots=2)
    scheduler = Scheduler(layout, max_step_tokens=64, has_spare_memory=lambda: has_memory)
    touched: set[int] = set()
    for number in range(100):
        sequence = a_sequence(range(100 * number, 100 * number + 10))
        scheduler.add(sequence)
        plan = scheduler.plan()
        touched.update(sequence.blocks)
        scheduler.commit(plan, [])
        scheduler.drop(sequence)
        scheduler.check()
    assert len(touched) == expected, "two of three blocks are full, and kept"
