"""Real gateway and worker processes for tests, on loopback, against the private broker."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

ROOT = Path(__file__).parent.parent
PROGRAM = ("common.cli",)
_START_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Process:
    """A `tokenfleet` process whose log is kept."""

    name: str
    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _reading: asyncio.Task | None = None

    @classmethod
    async def start(
        cls,
        *arguments: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> "Process":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *program,
            *arguments,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self = cls(arguments[0], process)
        self._reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        async for line in self.process.stdout:
            self.lines.append(line.decode())
            self._changed.set()
        self._changed.set()

    async def logged(self, text: str) -> str:
        """The first line that contains `text`, once it is there."""
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                if self.process.returncode is not None:
                    raise AssertionError(
                        f"{self.name} ended without {text!r}:\n{''.join(self.lines)}"
                    )
                self._changed.clear()
                await self._changed.wait()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and give its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(30):
            code = await self.process.wait()
            await self._reading
        return code


class Fleet:
    """Any number of gateways and workers on one broker."""

    def __init__(self, redis_url: str, *, program: Sequence[str] = PROGRAM) -> None:
        self.redis_url = redis_url
        self.program = program
        self.processes: list[Process] = []

    async def worker(self, *options: str, model: str = "echo") -> Process:
        """A worker that is ready."""
        process = await Process.start(
            *("worker", "--redis-url", self.redis_url, "--model-id", model, *options),
            program=self.program,
        )
        self.processes.append(process)
        await process.logged("ready")
        return process

    async def gateway(self, *options: str, ready: str = "/ready") -> str:
        """A gateway that answers 200 to `ready`; its URL."""
        port = free_port()
        process = await Process.start(
            "gateway",
            "--redis-url",
            self.redis_url,
            "--hostname",
            "127.0.0.1",
            "--port",
            str(port),
            *options,
            program=self.program,
        )
        self.processes.append(process)
        url = f"http://127.0.0.1:{port}"
        await _until_ok(f"{url}{ready}", process)
        return url

    async def stop(self) -> None:
        await asyncio.gather(*(process.stop(signal.SIGKILL) for process in self.processes))


async def _until_ok(url: str, process: Process) -> None:
    async with asyncio.timeout(_START_TIMEOUT_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                if process.process.returncode is not None:
                    raise AssertionError("".join(process.lines)) from None
            await asyncio.sleep(0.05)  # nothing announces an open port


def place_of(event_id: str) -> int:
    """The index in `<request id>:<index>-<hash>`."""
    return int(event_id.rpartition(":")[2].partition("-")[0])


async def generate(session: aiohttp.ClientSession, url: str, inputs: str, **parameters) -> dict:
    """The answer of `/generate`."""
    body = {"inputs": inputs, "parameters": parameters}
    async with session.post(f"{url}/generate", json=body) as answer:
        result = await answer.json()
        assert answer.status == 200, result
        return result


async def stream(
    session: aiohttp.ClientSession, url: str, inputs: str, **parameters
) -> AsyncIterator[tuple[str, dict]]:
    """`(id, event)` of `/generate_stream`."""
    body = {"inputs": inputs, "parameters": parameters}
    async with session.post(f"{url}/generate_stream", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for event in events_in(answer):
            yield event


async def events_in(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict]]:
    """`(id, event)` of a stream, as they come."""
    event_id = ""
    async for line in answer.content:
        if line.startswith(b"id:"):
            event_id = line[3:].strip().decode()
        elif line.startswith(b"data:"):
            yield event_id, json.loads(line[5:])
