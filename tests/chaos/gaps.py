"""How long readers wait when something dies: `python -m tests.chaos.gaps --samples 20`.

One stream at a time, read with the project's own client at two gateways; a fault at a drawn moment in its middle. The echo
model has no prefill, so what a model needs to read prompt and answer again comes on top.
"""

import asyncio
import json
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from common.client import FleetClient
from tests.benchmarks.machine import machine
from tests.chaos.arena import LEASE_S, Arena
from tests.chaos.report import replace_section
from tests.fleet import Process

NUM_TOKENS = 80
STEP_MS = 20.0
TEXT = "the quick brown fox jumps over the lazy dog " * 2

Fault = Callable[[Arena, str, str], Awaitable[Process]]


async def kill_worker(arena: Arena, request_id: str, _: str) -> Process:
    return _signalled(await arena.owner_of(request_id), signal.SIGKILL)


async def drain_worker(arena: Arena, request_id: str, _: str) -> Process:
    return _signalled(await arena.owner_of(request_id), signal.SIGTERM)


async def kill_gateway(arena: Arena, _: str, url: str) -> Process:
    return _signalled(arena.gateways[arena.urls.index(url)], signal.SIGKILL)


def _signalled(process: Process, number: int) -> Process:
    process.send(number)
    return process


# name: fault, what is allowed at the 95th percentile
ROWS: dict[str, tuple[Fault, float]] = {
    "worker kill -9": (kill_worker, 2.0),
    "worker SIGTERM": (drain_worker, 0.3),
    "gateway kill -9": (kill_gateway, 1.0),
}


@click.command(context_settings={"show_default": True})
@click.option("--samples", default=20)
@click.option("--seed", default=1)
@click.option("--report", type=click.Path(path_type=Path), help="Page whose section to replace.")
def main(samples: int, seed: int, report: Path | None) -> None:
    """Measure; exit with 1 if an aim is missed."""
    host = machine()
    found = asyncio.run(_measure(samples, random.Random(seed)))
    text = "\n".join([host.line, "", *_table(found)])
    click.echo(text)
    click.echo(json.dumps({"benchmark": "gaps", "machine": host.facts, "gaps_s": found}))
    if report:
        report.write_text(replace_section(report.read_text(), "gaps", text))
    raise SystemExit(int(any(_p95(gaps) > ROWS[name][1] for name, gaps in found.items())))


async def _measure(num_samples: int, draw: random.Random) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    async with Arena(draw, step_ms=STEP_MS) as arena:
        for number in range(num_samples):
            for name, (fault, _) in ROWS.items():
                gap_s = await _longest_gap(arena, fault, draw)
                found[name].append(round(gap_s, 3))
                click.echo(f"{number} {name}: {gap_s:.3f} s", err=True)
    return found


async def _longest_gap(arena: Arena, fault: Fault, draw: random.Random) -> float:
    """Of the events that come after the fault; they are checked to be all there."""
    break_at, last_at, longest_s, said = draw.randint(10, NUM_TOKENS - 30), 0.0, 0.0, 0
    urls = draw.sample(arena.urls, len(arena.urls))  # the client begins at the first
    async with FleetClient(*urls) as client:
        parameters = {"max_new_tokens": NUM_TOKENS}
        async for event in client.stream(
            TEXT, parameters=parameters, idempotency_key=str(draw.random())
        ):
            now, said = time.monotonic(), said + 1
            if said > break_at:
                longest_s = max(longest_s, now - last_at)
            last_at = now
            if said == break_at:
                broken = await fault(arena, await _request_id(arena), urls[0])
            assert event["index"] == said, f"event {event['index']} where {said} was due"
    assert said == NUM_TOKENS, f"{said} tokens"
    await arena.end(broken)
    await arena.replace_missing()
    return longest_s


async def _request_id(arena: Arena) -> str:
    """Of the one request that runs."""
    async for name in arena.redis.scan_iter(arena.keys.request("*")):
        if await arena.redis.hget(name, "state") == b"running":
            return name.decode().rpartition(":")[2]
    raise LookupError("no request runs")


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.95 * (len(values) - 1)))]


def _table(found: dict[str, list[float]]) -> list[str]:
    rows = [
        f"Longest gap between two events of a stream, lease {LEASE_S:g} s, a token every {STEP_MS:g} ms:",
        "",
        "| fault | samples | p50 s | p95 s | max s | aim at p95 |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        middle, p95, most = sorted(values)[len(values) // 2], _p95(values), max(values)
        rows.append(
            f"| {name} | {len(values)} | {middle:.2f} | {p95:.2f} | {most:.2f} | {ROWS[name][1]:g} s |"
        )
    return rows


if __name__ == "__main__":
    main()
