"""The queue's price: the ways it compares all serve every token."""

import asyncio
import itertools

from aiohttp.test_utils import TestServer

from tests.benchmarks.bare_server import EngineThread, application
from tests.benchmarks.client import StreamClient, WallClock
from tests.benchmarks.in_process import InProcessWorker
from tests.benchmarks.load import Load
from tests.benchmarks.prompts import BytePrompts
from tests.benchmarks.targets import target_for
from worker.settings import WorkerSettings

SETTINGS = WorkerSettings(model_id="echo", echo_delay_ms=0.1)


def test_the_direct_way_gives_every_token_of_every_request() -> None:
    worker = InProcessWorker(SETTINGS)
    try:
        records = worker.run(3, 8, Load(BytePrompts(16), 7, 8, duration_s=60.0), itertools.count())
    finally:
        worker.close()
    assert [record.num_tokens for record in records] == [7] * 8
    assert all(record.first_token_s >= 1e-4 for record in records)


async def test_the_bare_server_streams_every_token_to_each_of_its_clients() -> None:
    engine = EngineThread(InProcessWorker(SETTINGS), asyncio.get_running_loop())
    try:
        async with TestServer(application(engine)) as server:
            target = target_for("tgi")
            async with StreamClient(str(server.make_url("/")), target, clock=WallClock()) as client:
                prompts = ["to be or not to be", "all the world is a stage", "so long lives this"]
                records = await asyncio.gather(*(client.send(prompt, 5) for prompt in prompts))
    finally:
        engine.close()
    told = [(record.error, len(record.token_times), record.total_tokens) for record in records]
    assert told == [(None, 5, 5)] * 3
