"""A real model whose workers die again and again: `python -m tests.chaos.real_engine --model FOLDER`.

Every worker is told to end, as by kill -9, once it has written so many tokens; another one stands by and goes on. What
the client gets must chain on what it was sent, and in float32 be the very text of a run without faults. Where it is not,
the first token that differs is named, with how far apart the two best tokens were.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

from tests.benchmarks.machine import machine
from tests.chaos.arena import Arena
from tests.chaos.client import ChaosClient
from tests.chaos.report import replace_section
from tests.fleet import Process
from tests.simulation.streams import violations

PROMPT = (
    "<|im_start|>user\nTell a long story about a lighthouse.<|im_end|>\n<|im_start|>assistant\n"
)
NUMBERS = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 40}},
    "required": ["numbers"],
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 7}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLING,
    "structured": {"grammar": {"type": "json", "value": NUMBERS}},
    "n=2": {},  # by OpenAI's route, sampled
}


@dataclass(slots=True)
class Answer:
    """What a client got: of one sequence, or of several."""

    texts: list[str]
    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(
        default_factory=list
    )  # between the two best logprobs of each token
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    num_deaths: int = 0


class Stage:
    """A gateway, and workers that die after some tokens, or never."""

    def __init__(self, arena: Arena, num_tokens: int, every: int) -> None:
        self._arena = arena
        self._num_tokens = num_tokens
        self._every = every
        self._is_over = asyncio.Event()
        self._started: list[Process] = []

    async def undisturbed(self, cases: list[str]) -> dict[str, Answer]:
        worker, _ = await asyncio.gather(
            self._arena.start_worker(), self._arena.start_gateway("--max-best-of", "2")
        )
        answers = {name: await self._ask(name) for name in cases}
        await self._arena.end(worker)
        return answers

    async def disturbed(self, name: str) -> Answer:
        self._is_over.clear()
        self._started.clear()
        await asyncio.gather(self._doomed(), self._doomed())
        replacing = asyncio.create_task(self._replace())
        answer = await self._ask(name)
        self._is_over.set()
        await replacing
        logs = ["".join(worker.lines) for worker in self._started]
        answer.num_deaths = sum("fault point" in log for log in logs)
        for worker in list(self._arena.workers):
            await self._arena.end(worker)
        return answer

    async def _doomed(self) -> None:
        option = f"step.after_reply#{self._every}:kill"
        self._started.append(await self._arena.start_worker("--fault-at", option))

    async def _replace(self) -> None:
        """Let two workers live: when one dies the other one goes on, and a third starts."""
        while not self._is_over.is_set():
            for worker in list(self._arena.workers):
                if worker.process.returncode is not None:
                    await self._arena.end(worker)
                    await self._doomed()
            await asyncio.sleep(0.02)

    async def _ask(self, name: str) -> Answer:
        if name == "n=2":
            return await self._ask_for_two()
        client = ChaosClient(self._arena.urls, self._arena.draw, top_n_tokens=2, **CASES[name])
        client.end_after_s = 300
        seen = await client.run(PROMPT, max_new_tokens=self._num_tokens, is_resuming=True)
        problems = violations(seen.seen, (), lambda prompt, tokens: range(1 << 31))
        if seen.seen.error:
            problems.append(f"error: {seen.seen.error}")
        return Answer(
            [seen.text or ""],
            [token.text for _, frame in seen.seen.frames for token in frame.tokens],
            [_margin(event) for event in seen.events],
            [*problems, *seen.problems],
            seen.longest_gap_s,
        )

    async def _ask_for_two(self) -> Answer:
        body = {"model": self._arena.keys.model, "prompt": PROMPT, "max_tokens": self._num_tokens}
        body |= {"n": 2, "temperature": 0.8, "top_p": 0.9, "seed": 7}
        url = f"{self._arena.urls[0]}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            told = await answer.json()
        if answer.status != 200:
            return Answer([], problems=[f"error: {told}"])
        return Answer([choice["text"] for choice in told["choices"]])


def _margin(event: dict[str, Any]) -> float:
    best = sorted((top["logprob"] for top in event.get("top_tokens") or ()), reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def compare(expected: Answer, got: Answer) -> str:
    """In words: equal, or where they part."""
    if expected.texts == got.texts:
        return "equal"
    for index, (one, other) in enumerate(zip(expected.tokens, got.tokens, strict=False)):
        if one != other:
            margin = expected.margins[index]
            return f"from token {index} on: {other!r} for {one!r}, the best two {margin:.1e} apart"
    return "another text"


async def play(
    model: str,
    *,
    dtype: str,
    num_tokens: int,
    every: int,
    cases: list[str],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[Answer, Answer]]:
    """For each case the answer without faults, and the one with them."""
    options = ("--dtype", dtype, "--device", "cpu", "--threads", "1")
    options += ("--max-batch-total-tokens", "4096", "--max-total-tokens", "1024")
    arena = Arena(
        random.Random(1),
        num_gateways=0,
        num_workers=0,
        model=model,
        worker_options=options,
        sabotage="nothing",
    )
    async with arena:
        stage = Stage(arena, num_tokens, every)
        expected = await stage.undisturbed(cases)
        found = {}
        for name in cases:
            started = time.monotonic()
            found[name] = expected[name], await stage.disturbed(name)
            say(
                f"{dtype} {name}: {time.monotonic() - started:.0f} s, {_row(dtype, name, *found[name])}"
            )
    return found


def _row(dtype: str, name: str, expected: Answer, got: Answer) -> str:
    chained = "yes" if not got.problems else "; ".join(got.problems)
    gap = f"{got.longest_gap_s:.1f}" if got.longest_gap_s else ""
    return f"| {dtype} | {name} | {got.num_deaths} | {chained} | {compare(expected, got)} | {gap} |"


@click.command(context_settings={"show_default": True})
@click.option("--model", default=".models/SmolLM2-135M-Instruct")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"))
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)))
@click.option("--tokens", default=64)
@click.option("--every", default=8, help="Tokens that a worker writes before it dies.")
@click.option("--report", type=click.Path(path_type=Path), help="Page whose section to replace.")
def main(
    model: str,
    dtypes: tuple[str, ...],
    cases: tuple[str, ...],
    tokens: int,
    every: int,
    report: Path | None,
) -> None:
    """Play; exit with 1 if a stream did not chain on what was sent."""
    lines = [
        machine().line,
        "",
        "| dtype | case | deaths | chains | with the fault-free run | gap s |",
    ]
    lines.append("|---|---|---|---|---|---|")
    is_sound = True
    for dtype in dtypes:
        chosen = list(cases or CASES)
        found = asyncio.run(
            play(
                str(Path(model).resolve()),
                dtype=dtype,
                num_tokens=tokens,
                every=every,
                cases=chosen,
                say=lambda text: click.echo(text, err=True),
            )
        )
        lines += [_row(dtype, name, *answers) for name, answers in found.items()]
        is_sound &= not any(got.problems for _, got in found.values())
    click.echo("\n".join(lines))
    if report:
        report.write_text(replace_section(report.read_text(), "real engine", "\n".join(lines)))
    raise SystemExit(0 if is_sound else 1)


if __name__ == "__main__":
    main()
