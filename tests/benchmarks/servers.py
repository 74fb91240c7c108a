"""Starts tokenfleet's own processes for a benchmark and ends them with it. Knows the command line,
nothing inside.
"""

import asyncio
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import click

from common.child import Child, describe_exit
from tests.benchmarks.client import StreamClient, WallClock
from tests.benchmarks.targets import target_for

STOP_TIMEOUT_S = 30.0
POLL_S = 0.02
LOG_TAIL_BYTES = 3000


@asynccontextmanager
async def process(
    name: str, arguments: list[str], folder: Path, *, module: str = "common.cli"
) -> AsyncIterator[Child]:
    """`tokenfleet ARGUMENTS`, or another module with them, as a child that logs into `folder` and
    is stopped at the end of the context.
    """
    with (folder / f"{name}.log").open("wb") as output:
        child = Child([sys.executable, "-m", module, *arguments], output=output)
    try:
        yield child
    finally:
        child.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await child.exited()
        except TimeoutError:
            child.kill()


@asynccontextmanager
async def serve(
    model_id: str, options: list[str], *, ready_timeout_s: float
) -> AsyncIterator[tuple[str, float]]:
    """`tokenfleet serve` on a free port; yields its address and its cold start in seconds, to the
    first token.
    """
    port = free_port()
    arguments = ["serve", "--model-id", model_id, "--port", str(port), *options]
    with tempfile.TemporaryDirectory(prefix="tokenfleet-bench-") as folder:
        start = time.perf_counter()
        async with process("serve", arguments, Path(folder)) as child:
            url = f"http://127.0.0.1:{port}"
            await first_token(url, {"serve": child}, Path(folder), timeout_s=ready_timeout_s)
            yield url, time.perf_counter() - start


async def first_token(
    url: str, children: dict[str, Child], folder: Path, *, timeout_s: float
) -> None:
    """Ask for one token until there is one.

    Raises ClickException, with the ends of the logs, when a child ends or the time is over.
    """
    asking = asyncio.create_task(_ask(url, timeout_s))
    exits = {asyncio.create_task(child.exited()): name for name, child in children.items()}
    tasks = [asking, *exits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return await asking
        ended = [
            f"{name} ended, {describe_exit(task.result())}"
            for task, name in exits.items()
            if task.done()
        ]
        reason = "; ".join(ended) or f"no token after {timeout_s:g} s"
        raise click.ClickException(
            "\n".join([reason, *(_log_tail(folder, name) for name in children)])
        )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(url: str, timeout_s: float) -> None:
    target = target_for("tgi")
    async with StreamClient(url, target, clock=WallClock(), timeout_s=timeout_s) as client:
        while (await client.send("Hello", 1)).error is not None:
            await asyncio.sleep(POLL_S)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _log_tail(folder: Path, name: str) -> str:
    data = (folder / f"{name}.log").read_bytes()[-LOG_TAIL_BYTES:]
    return f"--- end of {name}.log ---\n{data.decode(errors='replace')}"
