"""A worker of two shards as real processes: it serves, and a lost or stuck shard costs a stream a
pause, not a token."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import transformers

from tests.checkpoints import VOCAB_SIZE, save_checkpoint
from tests.fleet import Fleet, Process, free_port, generate, place_of, stream

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("session_deadline")]

PROMPT = "w5 w6 w7"
NUM_TOKENS = 120  # at some 10 ms each there is a middle in which to kill
MIDDLE = 20
LOST_AFTER_S = 5.0
# Becomes `sitecustomize.py`: a shard's first collective takes long, as NCCL's does, which has to build
# its communicators in it.
SLOW_FIRST_COLLECTIVE = """
import sys, time
if "--shard-rank" in sys.orig_argv:
    import torch.distributed as dist
    real, pauses_s = dist.all_reduce, [4.0]
    def all_reduce(*arguments, **options):
        if pauses_s and "group" not in options:
            time.sleep(pauses_s.pop())
        return real(*arguments, **options)
    dist.all_reduce = all_reduce
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    save_checkpoint(folder, config)
    return str(folder)


@pytest.fixture
async def session_deadline() -> AsyncIterator[None]:
    async with asyncio.timeout(230):
        yield


async def start(fleet: Fleet, model: str, *more: str) -> Process:
    options = ("--num-shard", "2", "--lease-s", "1.5", "--device", "cpu", "--dtype", "float32")
    return await fleet.worker(*options, *more, model=model)


def shards(launcher: Process) -> list[int]:
    """Process ids of the shards that run now, by rank."""
    pid = launcher.process.pid
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        found[int(command[command.index("--shard-rank") + 1])] = int(child)
    return [found[rank] for rank in sorted(found)]


def is_running(pid: int) -> bool:
    """Not gone, nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def interrupted(
    session: aiohttp.ClientSession, url: str, pid: int, number: int
) -> tuple[list[tuple[str, dict]], float]:
    """The events of a stream whose shard `pid` gets a signal in the middle; and when it got it."""
    events = []
    sent_at = 0.0
    async for event in stream(session, url, PROMPT, max_new_tokens=NUM_TOKENS):
        events.append(event)
        if len(events) == MIDDLE:
            os.kill(pid, number)
            sent_at = time.monotonic()
    return events, sent_at


def check(events: list[tuple[str, dict]], whole: dict) -> None:
    """No token is lost, repeated or another one than without the interruption."""
    numbers = [place_of(event_id) for event_id, _ in events]
    assert numbers == list(range(NUM_TOKENS))
    assert [event["token"]["id"] for _, event in events] == [
        token["id"] for token in whole["details"]["tokens"]
    ]
    assert events[-1][1]["generated_text"] == whole["generated_text"]


async def test_a_group_serves_and_stops_in_good_order(
    fleet: Fleet, session: aiohttp.ClientSession, model: str
) -> None:
    worker = await start(fleet, model)
    url = await fleet.gateway()
    ranks = shards(worker)
    assert len(ranks) == 2
    answer = await generate(session, url, PROMPT, max_new_tokens=8, decoder_input_details=True)
    assert len(answer["details"]["tokens"]) == 8
    async with session.get(f"{url}/info") as info:
        (served,) = (await info.json())["models"]
    assert [one["shards"] for one in served["workers"]] == [2]
    assert await worker.stop() == 0
    assert not any(map(is_running, ranks))
    assert not any("is lost" in line or "Traceback" in line for line in worker.lines)


async def test_a_first_collective_may_take_longer_than_a_stuck_step(
    fleet: Fleet,
    session: aiohttp.ClientSession,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_FIRST_COLLECTIVE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    worker = await start(fleet, model, "--shard-timeout-s", "2")
    url = await fleet.gateway()
    answer = await generate(session, url, PROMPT, max_new_tokens=8, decoder_input_details=True)
    assert len(answer["details"]["tokens"]) == 8
    assert not any("is lost" in line for line in worker.lines)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_stream_outlives_its_shards(
    fleet: Fleet, session: aiohttp.ClientSession, model: str
) -> None:
    worker = await start(fleet, model)
    url = await fleet.gateway()
    whole = await generate(session, url, PROMPT, max_new_tokens=NUM_TOKENS, details=True)
    for rank, number, message in (
        (1, signal.SIGKILL, "shard 1 of 2 is lost (SIGKILL"),
        (1, signal.SIGSTOP, "shard 1 of 2 is lost (no sign of life"),
        (0, signal.SIGSTOP, "shard 0 of 2 is lost (no sign of life"),
    ):
        worker.lines.clear()
        ranks = shards(worker)
        running = asyncio.create_task(interrupted(session, url, ranks[rank], number))
        await worker.logged(message)
        lost_at = time.monotonic()
        events, sent_at = await running
        check(events, whole)
        assert lost_at - sent_at < LOST_AFTER_S
        assert not set(shards(worker)) & set(ranks)


async def test_kill_minus_nine_of_the_launcher_leaves_no_shard(fleet: Fleet, model: str) -> None:
    worker = await start(fleet, model)
    ranks = shards(worker)
    await worker.stop(signal.SIGKILL)  # its output ends when the last shard has closed it
    async with asyncio.timeout(5):  # a process closes its files shortly before it is gone
        while any(map(is_running, ranks)):
            await asyncio.sleep(0)


async def test_a_model_that_cannot_be_loaded_ends_the_worker(
    redis_url: str, tmp_path: Path
) -> None:
    options = ("--redis-url", redis_url, "--num-shard", "2", "--model-id", str(tmp_path / "absent"))
    worker = await Process.start("worker", *options)
    await worker.logged("could not start (exit code 1)")
    assert await worker.process.wait() == 1
    assert any("there is no folder" in line for line in worker.lines)


async def test_shards_of_two_machines(
    fleet: Fleet, session: aiohttp.ClientSession, model: str
) -> None:
    """Both are this one, but they share no memory: plans go by broadcast."""
    nodes = ("--num-shard", "2", "--num-nodes", "2", "--master-port", str(free_port()))
    options = ("--redis-url", fleet.redis_url, "--model-id", model, "--dtype", "float32", *nodes)
    other = await Process.start("worker", *options, "--node-rank", "1")
    fleet.processes.append(other)
    worker = await fleet.worker("--dtype", "float32", *nodes, model=model)
    assert [len(shards(node)) for node in (worker, other)] == [1, 1]
    url = await fleet.gateway()
    prompt = " ".join(f"w{number % 100 + 5}" for number in range(400))  # a plan of two broadcasts
    answer = await generate(session, url, prompt, max_new_tokens=8, details=True)
    assert len(answer["details"]["tokens"]) == 8
    assert await worker.stop() == 0
    assert await other.stop() in (0, 1)  # asked to end while it waits for its other half, or not
