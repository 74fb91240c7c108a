"""`text-generation-launcher` started as scripts start TGI's, with the echo model: port, start-up line, SIGTERM."""

import asyncio
import os
import signal
import sys
import time

import aiohttp
import pytest

from tests.fleet import ROOT

pytestmark = [pytest.mark.redis]

TIMEOUT_S = 3
FLAGS = ["--shard-uds-path", "/run/tgi", "--master-port", "29511", "--num-shard", "1"]
LIMITS = ["--max-input-length", "1000", "--max-total-tokens", "2000", "--cuda-graphs", "0"]
VARIABLES = {"LOG_LEVEL": "info,text_generation_router=debug", "PREFILL_CHUNKING": "1"}


async def is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


async def line_with(text: str, process: asyncio.subprocess.Process) -> str:
    async for line in process.stderr:
        if text in line.decode():
            return line.decode()
    raise AssertionError(f"the log ended without {text!r}")


async def test_it_starts_and_stops_as_tgi_does(free_port):
    program = "from common.launcher import launcher; launcher(prog_name='text-generation-launcher')"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "--model-id", "echo", "-p", str(free_port)),
        *(*FLAGS, *LIMITS, "--echo-delay-ms", "500", "--graceful-termination-timeout"),
        str(TIMEOUT_S),
        cwd=ROOT,
        env={**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            line = await line_with("accepted without effect", process)
            assert "--cuda-graphs, --shard-uds-path" in line
            assert not await is_open(free_port), "not before the model can answer"
            await line_with("is ready after", process)
            assert await is_open(free_port)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{free_port}") as session:
                body = {"inputs": "a" * 900, "parameters": {"max_new_tokens": 900}}
                stream = await session.post("/generate_stream", json=body)
                assert stream.status == 200 and await stream.content.readline()
                process.send_signal(signal.SIGTERM)
                asked_at = time.monotonic()
                events = [line async for line in stream.content if line.startswith(b"data:")]
                assert events and b'"error":' in events[-1], "the end is said, not left out"
            await process.stderr.read()
            assert await process.wait() == 0
            assert time.monotonic() - asked_at < TIMEOUT_S + 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
