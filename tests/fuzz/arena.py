"""A fleet to be shot at: one gateway, one worker with a tiny real model, and a witness that it still serves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from common.broker import start_broker
from tests.fleet import Fleet, Process
from tests.tiny_model import save_tiny_model

TOTAL_TOKENS = 64  # answers are short, whatever is asked for
_OPTIONS = ("--request-deadline-s", "20", "--payload-limit", "100000", "--read-timeout-s", "5")


@dataclass(frozen=True, slots=True)
class Arena:
    """A gateway at `url`, and its process."""

    url: str
    gateway: Process

    async def check(self) -> None:
        """Fails unless the gateway answers, its process is the first, and its log tells of no accident."""
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 2, "details": True}}
        async with (
            aiohttp.ClientSession(self.url) as session,
            session.post("/generate", json=body) as response,
        ):
            assert response.status == 200, await response.text()
            assert (await response.json())["details"]["generated_tokens"] == 2
        assert self.gateway.process.returncode is None, "the gateway died"
        accidents = [line for line in self.gateway.lines if "Traceback" in line or "ERROR" in line]
        assert not accidents, "".join(self.gateway.lines[-60:])


@asynccontextmanager
async def open_arena(folder: Path) -> AsyncIterator[Arena]:
    """A fleet with its files in `folder`, for as long as the block."""
    save_tiny_model(folder / "tiny")
    broker = start_broker(folder / "broker", persistent=False)
    fleet = Fleet(broker.url)
    try:
        limit = ("--device", "cpu", "--max-total-tokens", str(TOTAL_TOKENS))
        await fleet.worker(*limit, model=str(folder / "tiny"))
        url = await fleet.gateway(*_OPTIONS)
        yield Arena(url, fleet.processes[-1])
    finally:
        await fleet.stop()
        broker.stop()
