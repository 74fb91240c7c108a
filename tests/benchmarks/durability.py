"""The price of durability: what STEP costs, and what a fleet loses to fences and journals.

    python -m tests.benchmarks.durability

One fleet journals, as always; of the other one a test's entry point takes fence and journal away, so
that its workers only publish. Both stand ready the whole time and are measured in turn, so that a
busy neighbour disturbs both alike. The broker's own time of a STEP is the mean of each of 20 parts.
"""

import json
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import click

from common.broker import start_broker
from common.messages import (
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
    first_chain,
    next_chain,
)
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import Append, Lease, RequestQueue
from common.subscriber import Subscriber
from tests.benchmarks.client import StreamClient, WallClock
from tests.benchmarks.load import Load, LoadGenerator, run_async
from tests.benchmarks.machine import machine
from tests.benchmarks.prompts import BytePrompts
from tests.benchmarks.targets import target_for
from tests.chaos.report import replace_section
from tests.fleet import Fleet

NUM_REQUESTS = 64
STEP_LIMIT_MS = 0.6
SHARE_LIMIT = 0.97
NUM_PARTS = 20
FLEETS = {"durable": "nothing", "only publish": "only-publish"}


@click.command(context_settings={"show_default": True})
@click.option("--steps", default=2000, help="Calls of STEP to time.")
@click.option("--rounds", default=8, help="Of each fleet.")
@click.option("--step-ms", default=15.0, help="Time of one step of the echo model.")
@click.option("--new-tokens", default=128)
@click.option("--report", type=click.Path(path_type=Path), help="Page whose section to replace.")
def main(steps: int, rounds: int, step_ms: float, new_tokens: int, report: Path | None) -> None:
    """Measure both; exit with 1 if an aim is missed."""
    host = machine()
    step = run_async(_time_steps(steps))
    rates = run_async(_compare(rounds, step_ms, new_tokens))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    share = medians["durable"] / medians["only publish"]
    text = "\n".join([host.line, "", *_page(step, rates, share, step_ms)])
    facts = {"benchmark": "durability", "machine": host.facts, "step": step, "tokens_per_s": rates}
    click.echo(text)
    click.echo(json.dumps(facts | {"share": share, "step_ms": step_ms, "new_tokens": new_tokens}))
    if report:
        report.write_text(replace_section(report.read_text(), "price", text))
    raise SystemExit(int(step["server_p50"] > STEP_LIMIT_MS or share < SHARE_LIMIT))


def _page(
    step: dict[str, float], rates: dict[str, list[float]], share: float, step_ms: float
) -> list[str]:
    """In Markdown."""
    rows = [
        f"STEP for {NUM_REQUESTS} requests, milliseconds (aim: {STEP_LIMIT_MS:g} inside the broker):",
        "",
        f"| {' | '.join(name.replace('_', ', ') for name in step)} |",
        "|---" * len(step) + "|",
        f"| {' | '.join(f'{value:.2f}' for value in step.values())} |",
        "",
        (
            f"{NUM_REQUESTS} streams, steps of {step_ms:g} ms; durable has **{share:.1%}** of "
            f"only publish (aim: {SHARE_LIMIT:.0%}):"
        ),
        "",
        "| tokens/s | rounds | median | least | most |",
        "|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        numbers = (statistics.median(values), min(values), max(values))
        rows.append(f"| {name} | {len(values)} | {' | '.join(f'{n:.0f}' for n in numbers)} |")
    return rows


async def _time_steps(num_steps: int) -> dict[str, float]:
    """Through `RequestQueue.append`, as a worker does it; somebody listens to every channel."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-bench-"))
        broker = start_broker(Path(folder))
        stack.callback(broker.kill)
        redis = open_redis(broker.url)
        stack.push_async_callback(redis.aclose)
        keys = ModelKeys("echo")
        queue = RequestQueue(redis, keys)
        await queue.create_group()
        subscriber = await stack.enter_async_context(Subscriber(broker.url))
        leases = await _leases(queue, num_steps)
        for lease in leases:
            subscriber.subscribe(keys.channel(lease.request.id))
        times, server = [], []
        for first in range(0, num_steps, num_steps // NUM_PARTS):
            await redis.config_resetstat()
            for base in range(first, first + num_steps // NUM_PARTS):
                times.append(await _step(queue, leases, base))
            stats = (await redis.info("commandstats"))["cmdstat_evalsha"]
            server.append(float(stats["usec_per_call"]) / 1000)
    times.sort()
    return {
        "server_p50": statistics.median(server),  # of the means of the parts
        "server_least": min(server),
        "client_p50": times[len(times) // 2],
        "client_least": times[0],
    }


async def _step(queue: RequestQueue, leases: list[Lease], base: int) -> float:
    """Append a token to every journal; the milliseconds that it took."""
    appends = []
    for lease in leases:
        tokens = (Token(base, " word", -1.25),)
        frame = Frame(tokens=tokens, chain=next_chain(first_chain(lease.request.id), tokens))
        appends.append(Append(lease.request.id, lease.token, lease.queue, base, frame))
    started = time.perf_counter()
    replies = await queue.append(appends, patience_s=5)
    took_ms = (time.perf_counter() - started) * 1000
    assert all(reply.is_ok for reply in replies)
    return took_ms


async def _leases(queue: RequestQueue, num_steps: int) -> list[Lease]:
    """As many running requests as a batch has."""
    for number in range(NUM_REQUESTS):
        request = GenerationRequest(
            id=f"{number:032x}",
            model="echo",
            prompt_tokens=tuple(range(64)),
            sampling=Sampling(),
            stopping=Stopping(max_new_tokens=num_steps + 1),
        )
        await queue.enqueue(request, max_waiting=NUM_REQUESTS)
    return await queue.lease("worker", await queue.fetch("worker", count=NUM_REQUESTS))


async def _compare(num_rounds: int, step_ms: float, new_tokens: int) -> dict[str, list[float]]:
    """Tokens a second of each fleet, round by round in turn."""
    load = Load(BytePrompts(64), new_tokens, NUM_REQUESTS, 120.0)
    rates: dict[str, list[float]] = {name: [] for name in FLEETS}
    async with AsyncExitStack() as stack:
        generators = {
            name: await _generator(stack, kind, load, step_ms) for name, kind in FLEETS.items()
        }
        for generator in generators.values():
            await generator.closed(NUM_REQUESTS)
        for number in range(num_rounds):
            order = list(generators) if number % 2 else list(reversed(generators))
            for name in order:
                level = await generators[name].closed(NUM_REQUESTS)
                if level.errors:
                    raise click.ClickException(f"{name}: {level.errors} {level.error_examples}")
                rates[name].append(level.tokens_per_s)
    return rates


async def _generator(stack: AsyncExitStack, kind: str, load: Load, step_ms: float) -> LoadGenerator:
    """A broker, a gateway and a worker of their own."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-bench-"))
    broker = start_broker(Path(folder))
    stack.callback(broker.kill)
    fleet = Fleet(broker.url, program=("tests.chaos.child", kind))
    stack.push_async_callback(fleet.stop)
    await fleet.worker("--echo-delay-ms", str(step_ms), "--max-batch-size", str(NUM_REQUESTS))
    url = await fleet.gateway()
    client = await stack.enter_async_context(
        StreamClient(url, target_for("tgi"), clock=WallClock())
    )
    return LoadGenerator(client, load)


if __name__ == "__main__":
    main()
