"""Tokens a second of a whole server beside transformers' `generate`, one after the other, one run.

python -m tests.benchmarks.throughput --serve MODEL                start, measure, stop, compare
python -m tests.benchmarks.throughput --url URL --baseline MODEL measure a running server, compare
"""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.client import StreamClient, WallClock
from tests.benchmarks.load import APIS, Load, numbers, run_async, run_levels
from tests.benchmarks.machine import machine
from tests.benchmarks.prompts import prompts_for
from tests.benchmarks.report import Level, aligned, plain, table
from tests.benchmarks.servers import serve
from tests.benchmarks.targets import target_for

BASELINE_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    serve: str | None
    serve_option: tuple[str, ...]
    url: str | None
    api: str
    model: str
    baseline: str | None
    no_baseline: bool
    users: list[int]
    requests_per_user: int
    duration_s: float
    prompt_tokens: int
    new_tokens: int
    temperature: float
    top_p: float
    tokenizer: str | None
    threads: int | None
    ready_timeout_s: float

    def __post_init__(self) -> None:
        if bool(self.serve) == bool(self.url):
            raise click.UsageError("give either --serve MODEL or --url URL")
        if not (self.baseline_model or self.no_baseline):
            raise click.UsageError("--url needs --baseline MODEL, or --no-baseline")
        if self.tokenizer_path is None:
            raise click.UsageError(
                "no tokenizer.json in the model's folder; name one with --tokenizer, or `bytes`"
            )

    @property
    def baseline_model(self) -> str | None:
        return self.baseline or self.serve

    @property
    def tokenizer_path(self) -> str | None:
        """The one that was named, else the one in the model's folder."""
        if self.tokenizer or not self.baseline_model:
            return self.tokenizer
        path = Path(self.baseline_model).expanduser() / "tokenizer.json"
        return str(path) if path.exists() else None


@click.command(context_settings={"show_default": True})
@click.option("--serve", help="Start `tokenfleet serve` with this model: a folder or hub id.")
@click.option("--serve-option", multiple=True, help="Passed on: --serve-option=--threads=2.")
@click.option("--url", help="Measure this running server instead.")
@click.option("--api", type=APIS, default="tgi", help="Dialect of the server.")
@click.option("--model", default="", help="The `model` field of OpenAI requests.")
@click.option("--baseline", help="Model for transformers; the default is that of --serve.")
@click.option("--no-baseline", is_flag=True, help="Leave transformers out.")
@click.option("--concurrency", "users", callback=numbers(int), default="1,8,32")
@click.option("--requests-per-user", default=4, help="Whole rounds: no user idles at the end.")
@click.option("--duration", "duration_s", default=120.0, help="Seconds of a level, at most.")
@click.option("--prompt-tokens", default=64)
@click.option("--new-tokens", default=64)
@click.option("--temperature", default=0.0, help="0 is greedy decoding.")
@click.option("--top-p", default=1.0, help="With a temperature only; 1 is off.")
@click.option("--tokenizer", help="A tokenizer.json; the default is the one of the model.")
@click.option("--threads", type=int, help="CPU threads of transformers; else torch's default.")
@click.option("--ready-timeout", "ready_timeout_s", default=300.0, help="Of the cold start.")
def main(**values: Any) -> None:
    """Measure a server and transformers on this machine; print tables, then one line of JSON."""
    options = Options(**values)
    host = machine()
    lengths = f"prompts of {options.prompt_tokens} tokens, answers of {options.new_tokens}"
    click.echo(f"{host.line}\n{lengths}\n")
    levels, cold_start_s = run_async(_measure(options))
    if cold_start_s is not None:
        click.echo(f"cold start to first token: {cold_start_s:.1f} s\n")
    click.echo(table(levels))
    if not options.no_baseline:
        click.echo("now transformers, which takes longer ...", err=True)
    comparison = None if options.no_baseline else _transformers(options)
    if comparison:
        click.echo(_ratios(levels, comparison))
    result = {"benchmark": "throughput", "machine": host.facts, "options": asdict(options)}
    result |= {"cold_start_s": cold_start_s, "levels": [level.facts for level in levels]}
    click.echo(json.dumps(plain(result | {"transformers": comparison})))
    sys.exit(1 if any(level.errors for level in levels) else 0)


async def _measure(options: Options) -> tuple[list[Level], float | None]:
    """Every level, and the cold start in seconds when the server was started here."""
    prompt = prompts_for(options.tokenizer_path, options.prompt_tokens)
    target = target_for(
        options.api,
        model=options.model,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    levels = []
    async with _server(options) as (address, cold_start_s):
        for num_users in options.users:
            client = StreamClient(address, target, clock=WallClock())
            num_requests = num_users * options.requests_per_user
            own = _shifted(prompt, len(levels))
            load = Load(own, options.new_tokens, num_requests, options.duration_s)
            # A full round of users warms up: it meets every batch size on the way.
            levels += await run_levels(
                client, load, users=[num_users], rates=[], num_warmup=num_users
            )
    return levels, cold_start_s


@asynccontextmanager
async def _server(options: Options) -> AsyncIterator[tuple[str, float | None]]:
    if options.url:
        yield options.url, None
        return
    assert options.serve is not None
    start = serve(
        options.serve, list(options.serve_option), ready_timeout_s=options.ready_timeout_s
    )
    async with start as (address, cold_start_s):
        yield address, cold_start_s


def _shifted(prompt: Callable[[int], str], level: int) -> Callable[[int], str]:
    """Prompts of a level's own: it must not be answered from a former one's prefix cache."""
    return lambda index: prompt(index + level * 1_000_000)


def _transformers(options: Options) -> dict[str, Any]:
    """Run the baseline at the smallest and the largest batch that was measured."""
    batches = sorted({min(options.users), max(options.users)})
    arguments = {
        "--model-id": options.baseline_model,
        "--batches": ",".join(map(str, batches)),
        "--prompt-tokens": options.prompt_tokens,
        "--new-tokens": options.new_tokens,
        "--temperature": options.temperature,
        "--top-p": options.top_p,
        "--threads": options.threads,
    }
    command = [sys.executable, "-m", "tests.benchmarks.transformers_baseline"]
    for name, value in arguments.items():
        command += [name, str(value)] if value is not None else []
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BASELINE_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise click.ClickException(f"transformers failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _ratios(levels: list[Level], comparison: dict[str, Any]) -> str:
    by_batch = {row["batch"]: row for row in comparison["rows"]}
    rows = [
        [
            "batch",
            "server tokens/s",
            "transformers",
            "ratio",
            "server first token ms",
            "transformers",
        ]
    ]
    for level in levels:
        if row := by_batch.get(int(level.value)):
            ratio = level.tokens_per_s / row["tokens_per_s"]
            cells = [
                f"{level.value:g}",
                f"{level.tokens_per_s:.1f}",
                f"{row['tokens_per_s']:.1f}",
                f"{ratio:.2f}x",
            ]
            rows.append([*cells, f"{level.first_token_ms.p50:.1f}", f"{row['first_token_ms']:.1f}"])
    facts = {key: comparison[key] for key in ("device", "dtype", "attention", "threads")}
    title = (
        "beside transformers' generate ("
        + ", ".join(f"{key} {value}" for key, value in facts.items())
        + ")"
    )
    return "\n".join([title, *aligned(rows), ""])


if __name__ == "__main__":
    main()
