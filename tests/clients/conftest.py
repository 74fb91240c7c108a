"""One fleet for all clients, and a way to run a client's program in an environment of its own."""

import asyncio
import json
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.broker import Broker, start_broker
from tests.environments import python_with
from tests.fleet import Fleet
from tests.tiny_model import save_tiny_model

HERE = Path(__file__).parent
KEY = "secret"
SCENARIOS_S = 90


@dataclass(frozen=True, slots=True)
class Servers:
    """Three gateways that want `key`. Unless a request names another, the model is `echo`."""

    url: str
    full: str  # holds as many requests as it may, so it answers 429
    empty: str  # of a fleet without workers, so it answers 503
    key: str = KEY


class Background:
    """An event loop in a thread, for what outlives the loop of a test."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of its own: other tests empty theirs."""
    broker = start_broker(tmp_path_factory.mktemp("broker"), persistent=False)
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def servers(
    broker: Broker, background: Background, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    tiny = tmp_path_factory.mktemp("tiny")
    save_tiny_model(tiny)
    fleet, other = Fleet(broker.url), Fleet(f"{broker.url}?db=1")
    options = ("--api-key", KEY, "--model-id", "echo")

    async def start(stack: AsyncExitStack) -> Servers:
        stack.push_async_callback(fleet.stop)
        stack.push_async_callback(other.stop)
        await asyncio.gather(
            fleet.worker(),
            fleet.worker("--served-model-name", "slow", "--echo-delay-ms", "2000"),
            fleet.worker("--served-model-name", "tiny", "--device", "cpu", model=str(tiny)),
        )
        servers = Servers(
            *await asyncio.gather(
                fleet.gateway(*options),
                fleet.gateway(*options, "--max-concurrent-requests", "1"),
                other.gateway(*options, ready="/health/live"),
            )
        )
        await stack.enter_async_context(_filled(servers.full))
        return servers

    stack = AsyncExitStack()
    try:
        yield background.run(start(stack))
    finally:
        background.run(stack.aclose())


@asynccontextmanager
async def _filled(url: str) -> AsyncIterator[None]:
    """Take the only permit of a gateway."""
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"inputs": "a", "model": "slow", "parameters": {"ignore_eos_token": True}}
    async with (
        aiohttp.ClientSession(url, headers=headers) as session,
        session.post("/generate_stream", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        yield


RunProgram = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def run_program(servers: Servers) -> RunProgram:
    """Run a program of this folder with the requirements of a file; gives what its scenarios came to."""

    def run(program: str, requirements: str) -> dict[str, Any]:
        python = python_with(HERE / requirements)
        command = [python, HERE / program, json.dumps(asdict(servers))]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=SCENARIOS_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])  # litellm prints hints before it

    return run
