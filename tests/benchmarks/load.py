"""A load generator for streaming servers: `python -m tests.benchmarks.load --concurrency 1,8,32`.

Closed loop: N users, each sends its next request when the last one ended. It finds what a server
can do. Open loop: requests arrive at a rate, whether or not earlier ones were answered, and latency
counts from the intended arrival. It finds what users feel; a closed loop would stop asking while a
server stalls (coordinated omission).
"""

import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import uvloop

from tests.benchmarks.client import Clock, RequestRecord, StreamClient, WallClock
from tests.benchmarks.machine import machine
from tests.benchmarks.prompts import prompts_for
from tests.benchmarks.report import Level, summarize, table
from tests.benchmarks.targets import target_for


@dataclass(frozen=True, slots=True)
class Load:
    """What every level of a run has in common."""

    prompt: Callable[[int], str]
    max_new_tokens: int = 64
    num_requests: int = 64  # of one level; none is started after this many
    duration_s: float = 60.0  # of one level; none is started after this long
    is_staggered: bool = False  # users of a closed loop begin at once, but end in turn from then on
    longest_pause_s: float = 0.0  # of a user of a closed loop before each request

    def tokens_of(self, number: int, num_users: int) -> int:
        """How many tokens a level's request asks for, counted from 0. Staggered, the first of each
        user has a length of its own, and users whose answers are all as long stay out of step."""
        if not self.is_staggered or number >= num_users:
            return self.max_new_tokens
        return max(1, self.max_new_tokens * (number + 1) // num_users)

    def pause_s(self, number: int) -> float:
        """How long its user waits before a request of a level: evenly spread, the same in every run."""
        return random.Random(number).uniform(0, self.longest_pause_s)


class LoadGenerator:
    """Runs levels against one client. Prompts are numbered through all levels, so that none is sent
    twice.
    """

    def __init__(self, client: StreamClient, load: Load) -> None:
        self._client = client
        self._load = load
        self._clock: Clock = client.clock
        self._indices = itertools.count()

    async def closed(self, num_users: int, *, num_warmup: int = 0) -> Level:
        """`num_users` users in a closed loop."""
        await self._warm_up(num_warmup, num_users)
        records: list[RequestRecord] = []
        prompts = enumerate(self._prompts(self._load.num_requests))
        cpu_start, start = time.process_time(), self._clock.now()

        async def user() -> None:
            while self._clock.now() - start < self._load.duration_s:
                number, prompt = next(prompts, (0, None))
                if prompt is None:
                    return
                num_tokens = self._load.tokens_of(number, num_users)
                if pause_s := self._load.pause_s(number):
                    await self._clock.sleep_until(self._clock.now() + pause_s)
                records.append(await self._client.send(prompt, num_tokens))

        await _gather(user() for _ in range(num_users))
        return self._level("users", num_users, records, start, cpu_start)

    async def open(self, rate: float, *, num_warmup: int = 0, seed: int = 0) -> Level:
        """Poisson arrivals, `rate` a second."""
        await self._warm_up(num_warmup, num_warmup)
        records: list[RequestRecord] = []
        arrivals = poisson_arrivals(rate, seed=seed, duration_s=self._load.duration_s)
        offsets = list(itertools.islice(arrivals, self._load.num_requests))
        prompts = self._prompts(len(offsets))
        cpu_start, start = time.process_time(), self._clock.now()

        async def request(prompt: str, at: float) -> None:
            num_tokens = self._load.max_new_tokens
            records.append(await self._client.send(prompt, num_tokens, intended_at=at))

        async with asyncio.TaskGroup() as group:
            for prompt, offset in zip(prompts, offsets, strict=True):
                await self._clock.sleep_until(start + offset)
                group.create_task(request(prompt, start + offset))
        return self._level("requests/s", rate, records, start, cpu_start)

    async def _warm_up(self, num_requests: int, num_users: int) -> None:
        """Connections, caches and graphs get warm; nothing is recorded, an error ends the run."""
        prompts = iter(self._prompts(num_requests))

        async def user() -> None:
            for prompt in prompts:
                record = await self._client.send(prompt, self._load.max_new_tokens)
                if record.error:
                    raise click.ClickException(f"warm-up failed: {record.error}. {record.message}")

        await _gather(user() for _ in range(min(num_users, num_requests)))

    def _prompts(self, num_requests: int) -> list[str]:
        """Made before the clock starts: counting tokens takes time that belongs to nobody."""
        return [self._load.prompt(next(self._indices)) for _ in range(num_requests)]

    def _level(
        self, unit: str, value: float, records: list[RequestRecord], start: float, cpu_start: float
    ) -> Level:
        end = max((record.ended_at for record in records), default=start)
        cpu_s = time.process_time() - cpu_start
        return summarize(records, unit=unit, value=value, wall_s=end - start, client_cpu_s=cpu_s)


def poisson_arrivals(rate: float, *, seed: int, duration_s: float) -> Iterator[float]:
    """Arrival times in seconds from 0, exponentially spaced with mean 1 / `rate`, until
    `duration_s`.
    """
    if rate <= 0:
        raise ValueError(f"`rate` must be > 0. Given: {rate}")
    draw = random.Random(seed)
    now = draw.expovariate(rate)
    while now < duration_s:
        yield now
        now += draw.expovariate(rate)


async def _gather(tasks: Iterator) -> None:
    """All of them; the first that raises ends the others. A lone error comes out as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def numbers(kind: type) -> Callable:
    """A click callback for comma-separated numbers above zero."""

    def parse(context: click.Context, parameter: click.Parameter, text: str | None) -> list:
        try:
            values = [kind(part) for part in (text or "").split(",") if part]
        except ValueError as error:
            raise click.BadParameter(
                f"must be numbers separated by commas. Given: {text}"
            ) from error
        if any(value <= 0 for value in values):
            raise click.BadParameter(f"must be above zero. Given: {text}")
        return values

    return parse


async def run_levels(
    client: StreamClient,
    load: Load,
    *,
    users: list[int],
    rates: list[float],
    num_warmup: int | None = None,
) -> list[Level]:
    """Each concurrency, then each rate. Without `num_warmup`, one request a user, at most 8, warms
    up.
    """
    generator = LoadGenerator(client, load)
    levels = []
    async with client:
        for num_users in users:
            warm = min(num_users, 8) if num_warmup is None else num_warmup
            levels.append(await generator.closed(num_users, num_warmup=warm))
        for rate in rates:
            warm = 2 if num_warmup is None else num_warmup
            levels.append(await generator.open(rate, num_warmup=warm))
    return levels


def run_async(main):
    """Run a coroutine on uvloop: the generator shares the machine with what it measures and must be
    cheap.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    url: str
    api: str
    model: str
    users: list[int]
    rates: list[float]
    num_requests: int
    duration_s: float
    num_warmup: int | None
    prompt_tokens: int
    new_tokens: int
    tokenizer: str | None
    shared_prefix: float
    ignore_eos: bool
    timeout_s: float
    seed: int


APIS = click.Choice(["tgi", "openai", "openai-chat"])


@click.command(context_settings={"show_default": True})
@click.option("--url", default="http://127.0.0.1:8080", help="Base address of the server.")
@click.option("--api", type=APIS, default="tgi", help="Dialect of the server.")
@click.option("--model", default="", help="The `model` field of OpenAI requests.")
@click.option("--concurrency", "users", callback=numbers(int), help="Closed loop: users, 1,8,32.")
@click.option("--rate", "rates", callback=numbers(float), help="Open loop: requests/s, 2,4.5.")
@click.option("--requests", "num_requests", default=64, help="Requests of a level, at most.")
@click.option("--duration", "duration_s", default=60.0, help="Seconds of a level, at most.")
@click.option("--warmup", "num_warmup", type=int, help="Requests before a level, not counted.")
@click.option("--prompt-tokens", default=64, help="Length of every prompt.")
@click.option("--new-tokens", default=64, help="Length of every answer.")
@click.option("--tokenizer", help="A tokenizer.json that counts prompts, or `bytes`; else words.")
@click.option("--shared-prefix", default=0.0, help="Share of each prompt that all have in common.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="Always --new-tokens tokens.")
@click.option("--timeout", "timeout_s", default=120.0, help="Seconds until a request failed.")
@click.option("--seed", default=0, help="Of prompts and arrivals; change it to miss prefix caches.")
def main(**values: Any) -> None:
    """Load a streaming text generation server and tell what its users would feel.

    Without --concurrency and --rate: 1, 8 and 32 users. Prints a table, then one line of JSON.
    Exits with 1 when a request failed.
    """
    options = Options(**values)
    host = machine()
    click.echo(
        f"{options.api} at {options.url}: prompts of {options.prompt_tokens} tokens, "
        f"answers of {options.new_tokens}. Client: {host.line}\n"
    )
    levels = run_async(_run(options))
    click.echo(table(levels))
    facts = {"client": host.facts, "levels": [level.facts for level in levels]}
    click.echo(json.dumps({"benchmark": "load", "options": asdict(options)} | facts))
    sys.exit(1 if any(level.errors for level in levels) else 0)


async def _run(options: Options) -> list[Level]:
    try:
        prompt = prompts_for(
            options.tokenizer,
            options.prompt_tokens,
            seed=options.seed,
            shared_share=options.shared_prefix,
        )
        prompt(0)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    target = target_for(options.api, model=options.model, ignore_eos=options.ignore_eos)
    client = StreamClient(options.url, target, clock=WallClock(), timeout_s=options.timeout_s)
    load = Load(prompt, options.new_tokens, options.num_requests, options.duration_s)
    users = options.users or ([] if options.rates else [1, 8, 32])
    return await run_levels(
        client, load, users=users, rates=options.rates, num_warmup=options.num_warmup
    )


if __name__ == "__main__":
    main()
