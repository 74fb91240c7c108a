"""When the reaper looks: always, but for one lease after the broker was restarted."""

import asyncio

from worker.service.lease import Reaper


class RestartingQueue:
    """A queue on a broker whose run changes."""

    def __init__(self) -> None:
        self.run = "first"
        self.num_looks = 0

    async def broker_run(self) -> str:
        return self.run

    async def revoke_abandoned(self) -> int:
        self.num_looks += 1
        return 0


async def test_reaper_waits_for_a_lease_after_a_restart_of_the_broker():
    queue = RestartingQueue()
    reaper = Reaper(queue, lease_s=0.05)
    await reaper.reap()
    assert queue.num_looks == 1, "a reaper that has just begun looks at once"
    queue.run = "second"
    await reaper.reap()
    await reaper.reap()
    assert queue.num_looks == 1, "workers that live have had no time to say so"
    async with asyncio.timeout(2):
        while queue.num_looks == 1:
            await asyncio.sleep(0.01)
            await reaper.reap()
