"""What TGI v0.3.1 tests over HTTP, in our own words: a launcher is started as theirs is, `Test request` is sent with
details, and text, reason, counts, tokens and log-probabilities are those of transformers.

Theirs are bloom-560m, the same in two shards, and mt0-base; ours are of their shapes, tiny and random.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean

import aiohttp
import pytest

from tests.fleet import ROOT
from tests.golden_checkpoints import PROMPT, BloomCheckpoint, Golden, Mt0Checkpoint

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_TOKENS = 20  # v0.3.1's default
TOLERANCE = 1e-4
START_S = 90
LAUNCHER = "from common.launcher import launcher; launcher(prog_name='text-generation-launcher')"


@asynccontextmanager
async def launched(
    folder: Path, port: int, tmp_path: Path, *flags: str
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with a server of the checkpoint, which is stopped as TGI's tests stop theirs."""
    command = ["-c", LAUNCHER, "--model-id", str(folder), "--port", str(port), *flags]
    command += ["--shard-uds-path", str(tmp_path / "shard"), "--dtype", "float32"]
    command += ["--max-input-tokens", "30", "--max-total-tokens", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        await _until_open(port, process, tmp_path / "log")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _until_open(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    """The port refuses connections until the model can answer, so the first that is taken will be served."""
    async with asyncio.timeout(START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.1)  # nothing announces an open port
            else:
                writer.close()
                return


async def ask(session: aiohttp.ClientSession, **parameters: object) -> tuple[dict, dict[str, str]]:
    """The answer to the prompt, and its headers."""
    body = {"inputs": PROMPT, "parameters": {"details": True, **parameters}}
    async with session.post("/generate", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json(), response.headers


def check_details(details: dict, golden: Golden) -> None:
    assert [row["id"] for row in details["prefill"]] == golden.prompt
    check_logprobs([row["logprob"] for row in details["prefill"]], golden.prompt_logprobs)
    assert all(set(row) == {"id", "text", "logprob"} for row in details["prefill"])
    assert [token["id"] for token in details["tokens"]] == golden.tokens
    check_logprobs([token["logprob"] for token in details["tokens"]], golden.logprobs)
    assert details["generated_tokens"] == len(golden.tokens) and details["seed"] is None


def check_logprobs(ours: list[float | None], theirs: list[float | None]) -> None:
    assert [value is None for value in ours] == [value is None for value in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == (None if their is None else pytest.approx(their, abs=TOLERANCE))


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> BloomCheckpoint:
    return BloomCheckpoint(tmp_path_factory.mktemp("bloom"))


@pytest.fixture(scope="module")
def mt0(tmp_path_factory: pytest.TempPathFactory) -> Mt0Checkpoint:
    return Mt0Checkpoint(tmp_path_factory.mktemp("mt0"))


async def test_bloom(bloom: BloomCheckpoint, free_port: int, tmp_path: Path):
    async with launched(bloom.folder, free_port, tmp_path) as session:
        await _answers_as_transformers_does(session, bloom)
        await _stream_tells_the_same(session, bloom)
        await _best_of_has_the_others(session, bloom)


async def test_bloom_in_two_shards(bloom: BloomCheckpoint, free_port: int, tmp_path: Path):
    async with launched(bloom.folder, free_port, tmp_path, "--num-shard", "2") as session:
        await _answers_as_transformers_does(session, bloom)


async def test_mt0(mt0: Mt0Checkpoint, free_port: int, tmp_path: Path):
    """The decoder's prompt is the padding token that it starts with; the encoder's is not shown."""
    golden = mt0.golden(PROMPT, NUM_TOKENS)
    async with launched(mt0.folder, free_port, tmp_path) as session:
        answer, headers = await ask(session, max_new_tokens=NUM_TOKENS, decoder_input_details=True)
        details = answer["details"]
        assert details["finish_reason"] == "eos_token" and 1 < len(golden.tokens) < NUM_TOKENS
        check_details(details, golden)
        assert details["prefill"] == [{"id": 0, "text": "<pad>", "logprob": None}]
        assert details["tokens"][-1] == {
            "id": 1,
            "text": "</s>",
            "logprob": pytest.approx(golden.logprobs[-1], abs=TOLERANCE),
            "special": True,
        }
        assert answer["generated_text"] == mt0.tokenizer.decode(golden.tokens)
        assert headers["x-prompt-tokens"] == "3"  # with the encoder's end of sequence
        assert headers["x-generated-tokens"] == str(len(golden.tokens))
        await _best_of_has_the_others(session, mt0)


async def _answers_as_transformers_does(
    session: aiohttp.ClientSession, bloom: BloomCheckpoint
) -> None:
    golden = bloom.golden(PROMPT, NUM_TOKENS)
    answer, headers = await ask(session, max_new_tokens=NUM_TOKENS, decoder_input_details=True)
    details = answer["details"]
    assert details["finish_reason"] == "length"
    check_details(details, golden)
    assert [row["text"] for row in details["prefill"]] == ["Test", " request"]
    assert answer["generated_text"] == bloom.tokenizer.decode(golden.tokens)
    assert not any(token["special"] for token in details["tokens"])
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("2", str(NUM_TOKENS))
    assert set(details) == {"finish_reason", "generated_tokens", "seed", "prefill", "tokens"}

    answer, _ = await ask(session, max_new_tokens=NUM_TOKENS)
    assert answer["details"]["prefill"] == [], "since v0.9 only when it is asked for"


async def _stream_tells_the_same(session: aiohttp.ClientSession, bloom: BloomCheckpoint) -> None:
    golden = bloom.golden(PROMPT, NUM_TOKENS)
    body = {"inputs": PROMPT, "parameters": {"details": True, "max_new_tokens": NUM_TOKENS}}
    async with session.post("/generate_stream", json=body) as response:
        lines = [line async for line in response.content if line.startswith(b"data:")]
    events = [json.loads(line[5:]) for line in lines]
    assert [event["token"]["id"] for event in events] == golden.tokens
    check_logprobs([event["token"]["logprob"] for event in events], golden.logprobs)
    last = events[-1]
    assert last["generated_text"] == bloom.tokenizer.decode(golden.tokens)
    assert last["details"] == {
        "finish_reason": "length",
        "generated_tokens": NUM_TOKENS,
        "seed": None,
        "input_length": 2,
    }


async def _best_of_has_the_others(
    session: aiohttp.ClientSession, checkpoint: BloomCheckpoint | Mt0Checkpoint
) -> None:
    """Each sequence as likely as transformers says, and the likeliest a token is first."""
    answer, _ = await ask(
        session, best_of=2, do_sample=True, max_new_tokens=6, decoder_input_details=True
    )
    best, (other,) = answer["details"], answer["details"]["best_of_sequences"]
    assert set(other) == set(best) - {"best_of_sequences"} | {"generated_text"}
    assert best["prefill"] == other["prefill"] and best["seed"] != other["seed"]
    prompt, means = checkpoint.tokenizer.encode(PROMPT).ids, []
    for sequence in (best, other):
        tokens = [token["id"] for token in sequence["tokens"]]
        assert sequence["generated_tokens"] == len(tokens)
        expected = checkpoint.logprobs(prompt, tokens)
        check_logprobs([token["logprob"] for token in sequence["tokens"]], expected)
        means.append(fmean(expected))
    assert means[0] >= means[1] - TOLERANCE
    assert other["generated_text"] == checkpoint.tokenizer.decode(
        [token["id"] for token in other["tokens"]]
    )
