"""The price of the queue: what gateway, broker and worker loop add to the first token and to every
later one.

    python -m tests.benchmarks.queue_price

The echo model's step takes a known, steady time, so the difference between the same scheduler and
engine called in this process and a request through HTTP, gateway, broker and worker is what the
path costs. HTTP and the load generator's own time are in it, all processes share the cores: what
those alone come to is told by the same engine behind a bare HTTP server (`bare_server.py`). Several
users run three times: in step, because their answers are equally long, so that a first token is one
of a burst; out of step; and out of step with pauses of up to a step, as users are. Without a pause
a user asks again when a step has ended: called directly that is the moment at which the next one
begins, while through the fleet the request always comes too late for it.
"""

import json
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import click

from common.broker import start_broker
from common.child import Child
from tests.benchmarks import bare_server
from tests.benchmarks.client import StreamClient, WallClock
from tests.benchmarks.in_process import measure_in_process
from tests.benchmarks.load import Load, numbers, run_async, run_levels
from tests.benchmarks.machine import machine
from tests.benchmarks.prompts import BytePrompts
from tests.benchmarks.report import Level, aligned, plain, table
from tests.benchmarks.servers import first_token, free_port, process
from tests.benchmarks.targets import target_for

READY_TIMEOUT_S = 60.0
TOGETHER, OUT_OF_STEP, AT_ANY_TIME = "together", "out of step", "at any time"


@click.command(context_settings={"show_default": True})
@click.option("--concurrency", "users", callback=numbers(int), default="1,32")
@click.option("--requests-per-user", default=8)
@click.option("--step-ms", default=5.0, help="Time of one step of the echo model.")
@click.option("--prompt-tokens", default=64)
@click.option("--new-tokens", default=64)
@click.option("--redis-url", help="Use this broker; else a private one, append-only file on.")
def main(
    users: list[int],
    requests_per_user: int,
    step_ms: float,
    prompt_tokens: int,
    new_tokens: int,
    redis_url: str | None,
) -> None:
    """Measure the echo model here and through the fleet; print tables, then one line of JSON."""
    host = machine()
    click.echo(f"{host.line}\necho model, a step is {step_ms:g} ms\n")
    prompt = BytePrompts(prompt_tokens)
    loads = [
        (
            num,
            Load(
                prompt,
                new_tokens,
                num * requests_per_user,
                duration_s=120.0,
                is_staggered=begin != TOGETHER,
                longest_pause_s=step_ms / 1e3 if begin == AT_ANY_TIME else 0.0,
            ),
        )
        for num in users
        for begin in ((TOGETHER, OUT_OF_STEP, AT_ANY_TIME) if num > 1 else (TOGETHER,))
    ]
    direct = [measure_in_process(num, load, step_ms=step_ms) for num, load in loads]
    bare = run_async(_through_http(loads, step_ms))
    queued = run_async(_through_the_fleet(loads, step_ms, redis_url))
    click.echo("in this process\n" + table(direct))
    click.echo("through HTTP alone\n" + table(bare))
    click.echo("through gateway, broker and worker\n" + table(queued))
    prices = [
        _price(load, *levels)
        for (_, load), *levels in zip(loads, direct, bare, queued, strict=True)
    ]
    click.echo(_price_table(prices))
    facts = {"step_ms": step_ms, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    facts |= {"prices": prices, "direct": [level.facts for level in direct]}
    facts |= {"bare": [level.facts for level in bare]}
    facts |= {"queued": [level.facts for level in queued]}
    click.echo(json.dumps(plain({"benchmark": "queue_price", "machine": host.facts} | facts)))
    sys.exit(1 if any(level.errors for level in bare + queued) else 0)


async def _through_http(loads: list[tuple[int, Load]], step_ms: float) -> list[Level]:
    """The bare server; every level in turn."""
    port = free_port()
    arguments = ["--port", str(port), "--step-ms", str(step_ms)]
    with tempfile.TemporaryDirectory(prefix="tokenfleet-bench-") as name:
        folder = Path(name)
        async with process("bare", arguments, folder, module=bare_server.__name__) as child:
            return await _levels(loads, port, {"bare": child}, folder)


async def _through_the_fleet(
    loads: list[tuple[int, Load]], step_ms: float, redis_url: str | None
) -> list[Level]:
    """A private broker, one gateway and one worker; every level in turn."""
    port = free_port()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-bench-")))
        if redis_url is None:
            broker = start_broker(folder / "broker", port=0)
            stack.callback(broker.stop)
            redis_url = broker.url
        place = ["--redis-url", redis_url]
        commands = {
            "worker": ["worker", "--model-id", "echo", "--echo-delay-ms", str(step_ms), *place],
            "gateway": ["gateway", "--hostname", "127.0.0.1", "--port", str(port), *place],
        }
        children = {
            name: await stack.enter_async_context(process(name, arguments, folder))
            for name, arguments in commands.items()
        }
        return await _levels(loads, port, children, folder)


async def _levels(
    loads: list[tuple[int, Load]], port: int, children: dict[str, Child], folder: Path
) -> list[Level]:
    """Every load in turn, once the processes behind the port answer."""
    url = f"http://127.0.0.1:{port}"
    await first_token(url, children, folder, timeout_s=READY_TIMEOUT_S)
    levels = []
    for num_users, load in loads:
        client = StreamClient(url, target_for("tgi"), clock=WallClock())
        levels += await run_levels(client, load, users=[num_users], rates=[], num_warmup=num_users)
    return levels


def _price(load: Load, direct: Level, bare: Level, queued: Level) -> dict[str, float | str]:
    """Medians of the three ways, and what the fleet adds to the first, in milliseconds."""
    first = queued.first_token_ms.p50 - direct.first_token_ms.p50
    token = queued.token_ms.p50 - direct.token_ms.p50
    return {
        "users": direct.value,
        "begin": _begin(load),
        "direct_first_token_ms": direct.first_token_ms.p50,
        "bare_first_token_ms": bare.first_token_ms.p50,
        "queued_first_token_ms": queued.first_token_ms.p50,
        "added_first_token_ms": first,
        "direct_token_ms": direct.token_ms.p50,
        "bare_token_ms": bare.token_ms.p50,
        "queued_token_ms": queued.token_ms.p50,
        "added_token_ms": token,
    }


def _begin(load: Load) -> str:
    if not load.is_staggered:
        return TOGETHER
    return AT_ANY_TIME if load.longest_pause_s else OUT_OF_STEP


def _price_table(prices: list[dict[str, float | str]]) -> str:
    rows = [
        [
            "users",
            "begin",
            "first token ms: direct",
            "bare HTTP",
            "queued",
            "added",
            "a token ms: direct",
            "bare HTTP",
            "queued",
            "added",
        ]
    ]
    for price in prices:
        users, begin, *times = price.values()
        rows.append([f"{users:g}", begin, *(f"{time:.2f}" for time in times)])
    return "\n".join(
        ["the price of the queue, medians", *aligned(rows, extra_space_before=[6]), ""]
    )


if __name__ == "__main__":
    main()
