"""What a gateway can relay: many streams of the echo model, and what they cost the gateway's
processes.

    python -m tests.benchmarks.relay --streams 500                    # capacity of one process
    python -m tests.benchmarks.relay --streams 2000 --gateways 2      # many streams
    python -m tests.benchmarks.relay --streams 500 --seconds 600      # does memory stay flat?
    python -m tests.benchmarks.relay --streams 100 --slow-readers 10  # clients that do not read

All processes share the machine's cores, so what counts is tokens by second of the gateways' own
processor time: what one core of its own relays. A stream that ends is started again.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import click
import uvloop

from common.broker import start_broker
from tests.benchmarks.machine import machine
from tests.benchmarks.report import Distribution, aligned, plain
from tests.benchmarks.servers import first_token, free_port, process

READY_TIMEOUT_S = 60.0
BEGIN_TIMEOUT_S = 60.0  # for all streams to have a token
SLOTS = 512
TICK_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LONG_PROMPT = "x" * 400  # the echo model repeats its prompt, and ends with it


@dataclass(slots=True)
class Tally:
    """What the readers saw in the window that is measured, which opens when all have begun."""

    num_to_begin: int
    all_begun: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = False
    num_tokens: int = 0
    num_ended: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between neighbouring chunks of a stream
    errors: list[str] = field(default_factory=list)

    def note_begun(self) -> None:
        """One more has its first token; a slow reader has begun when it reads no more."""
        self.num_to_begin -= 1
        if not self.num_to_begin:
            self.all_begun.set()


class Stream(asyncio.Protocol):
    """One client: asks, counts the events that come, and asks again when they end."""

    def __init__(self, tally: Tally, *, is_slow: bool) -> None:
        self._tally = tally
        self._is_slow = is_slow
        self._heard_at = 0.0
        self._transport: asyncio.Transport
        self._is_first_chunk = True
        self._has_begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._ask()

    def data_received(self, data: bytes) -> None:
        now, tally = time.perf_counter(), self._tally
        if self._is_first_chunk:
            self._is_first_chunk = False
            if not data.startswith(b"HTTP/1.1 200"):
                tally.errors.append(data[:200].decode(errors="replace"))
            if self._is_slow:
                self._transport.pause_reading()
                self._begin()
        elif not self._has_begun:
            self._begin()
        elif tally.is_open:
            tally.num_tokens += data.count(b"\ndata:")
            tally.gaps_s.append(now - self._heard_at)
            if b'"error"' in data:
                tally.errors.append(data[:200].decode(errors="replace"))
        self._heard_at = now
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            tally.num_ended += tally.is_open
            self._ask()

    def _begin(self) -> None:
        self._has_begun = True
        self._tally.note_begun()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._tally.is_open and not self._is_slow:
            self._tally.errors.append(f"connection lost: {exc}")

    def _ask(self) -> None:
        self._is_first_chunk = True
        body = json.dumps({"inputs": LONG_PROMPT, "parameters": {"max_new_tokens": 400}}).encode()
        head = "POST /generate_stream HTTP/1.1\r\nHost: gateway\r\ncontent-type: application/json"
        self._transport.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


@dataclass(frozen=True, slots=True)
class Sample:
    """Processor seconds and resident bytes of the gateway's processes."""

    cpu_s: float
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """A window of a load."""

    streams: int
    gateways: int
    seconds: float
    tokens_per_s: float
    gateway_cores: float
    tokens_per_gateway_core_s: float
    chunk_gap_ms: Distribution
    ended_streams: int
    resident_mib: tuple[float, ...]  # at equal distances
    errors: int
    error_example: str


@click.command(context_settings={"show_default": True})
@click.option("--streams", default=500)
@click.option("--slow-readers", default=0, help="Streams beside them whose client stops reading.")
@click.option("--gateways", default=1, help="Gateway processes.")
@click.option("--seconds", default=10.0)
@click.option("--step-ms", default=10.0, help="Time of one step of the echo model.")
def main(streams: int, slow_readers: int, gateways: int, seconds: float, step_ms: float) -> None:
    """Relay streams of the echo model; print a table, then one line of JSON."""
    host = machine()
    click.echo(f"{host.line}\n")
    result = uvloop.run(_measure(streams, slow_readers, gateways, seconds, step_ms))
    rows = [[name.replace("_", " "), _cell(value)] for name, value in asdict(result).items()]
    click.echo("\n".join(aligned([["relay", ""], *rows], extra_space_before=[])))
    facts = {"benchmark": "relay", "machine": host.facts, "slow_readers": slow_readers}
    click.echo(json.dumps(plain(facts | {"step_ms": step_ms} | asdict(result))))
    sys.exit(1 if result.errors else 0)


async def _measure(
    num_streams: int, num_slow: int, num_gateways: int, seconds: float, step_ms: float
) -> Result:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-bench-")))
        broker = start_broker(folder / "broker", port=0)
        stack.callback(broker.stop)
        port, place = free_port(), ["--redis-url", broker.url]
        worker = ["worker", "--model-id", "echo", "--echo-delay-ms", str(step_ms), *place]
        worker += ["--max-batch-size", str(SLOTS)]
        total = num_streams + num_slow
        gateway = ["gateway", "--hostname", "127.0.0.1", "--port", str(port), *place]
        gateway += ["--gateway-workers", str(num_gateways), "--log-level", "warning"]
        gateway += ["--max-concurrent-requests", str(total + 10)]
        gateway += ["--max-waiting-requests", str(total + 10)]
        commands = {f"worker-{i}": worker for i in range(-(-total // SLOTS))} | {"gateway": gateway}
        children = {
            name: await stack.enter_async_context(process(name, arguments, folder))
            for name, arguments in commands.items()
        }
        await first_token(f"http://127.0.0.1:{port}", children, folder, timeout_s=READY_TIMEOUT_S)
        tally = Tally(total)
        loop = asyncio.get_running_loop()
        for number in range(total):
            is_slow = number >= num_streams
            _, client = await loop.create_connection(
                partial(Stream, tally, is_slow=is_slow), "127.0.0.1", port
            )
            stack.callback(client._transport.abort)
        async with asyncio.timeout(BEGIN_TIMEOUT_S):
            await tally.all_begun.wait()
        processes = _family(children["gateway"].pid)
        before, started_at = _sample(processes), time.perf_counter()
        tally.is_open = True
        memory = []
        for _ in range(10):
            await asyncio.sleep(seconds / 10)
            memory.append(round(_sample(processes).resident_bytes / 2**20, 1))
        tally.is_open = False
        wall_s, after = time.perf_counter() - started_at, _sample(processes)
    cpu_s = after.cpu_s - before.cpu_s
    return Result(
        streams=num_streams,
        gateways=num_gateways,
        seconds=wall_s,
        tokens_per_s=tally.num_tokens / wall_s,
        gateway_cores=cpu_s / wall_s,
        tokens_per_gateway_core_s=tally.num_tokens / cpu_s,
        chunk_gap_ms=Distribution.of_seconds(tally.gaps_s),
        ended_streams=tally.num_ended,
        resident_mib=tuple(memory),
        errors=len(tally.errors),
        error_example=tally.errors[0] if tally.errors else "",
    )


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in _family(int(child)))]


def _sample(pids: list[int]) -> Sample:
    cpu_s, resident_bytes = 0.0, 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu_s += (int(fields[11]) + int(fields[12])) / TICK_S
        resident_bytes += int(fields[21]) * PAGE_BYTES
    return Sample(cpu_s, resident_bytes)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {part:.1f}" for name, part in value.items())
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
