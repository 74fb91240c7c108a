"""`make fuzz`: both fuzzers for as long as is wanted, at a seed that is printed and can be given again."""

import asyncio
import secrets
import tempfile
from pathlib import Path

import click

from tests.fuzz.arena import open_arena
from tests.fuzz.raw_http import run_case, shoot
from tests.fuzz.schema_cases import LONG, run_cases

LEAST_CASES = 5_000


@click.command()
@click.option("--seed", type=int, help="Draws of both fuzzers; the default is a new one.")
@click.option("--seconds", default=300.0, help="How long to send spoiled HTTP.")
@click.option("--examples", default=40, help="Drawn cases of each operation and kind.")
@click.option("--case", type=int, help="Send only this case of spoiled HTTP.")
def main(seed: int | None, seconds: float, examples: int, case: int | None) -> None:
    """Shoot at a gateway, first with requests made from its schema, then with spoiled HTTP."""
    seed = secrets.randbits(31) if seed is None else seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        asyncio.run(_run(Path(folder), seed, seconds, examples, case))


async def _run(folder: Path, seed: int, seconds: float, examples: int, case: int | None) -> None:
    async with open_arena(folder) as arena:
        if case is not None:
            await run_case(arena.url, seed, case)
            await arena.check()
            return
        count = await run_cases(
            arena.url, seed=seed, max_examples=examples, phases=LONG, folder=folder
        )
        assert count >= LEAST_CASES, f"only {count} cases"
        print(f"schemathesis: {count} cases, no fault", flush=True)
        count = await shoot(arena, seed=seed, seconds=seconds)
        print(f"spoiled HTTP: {count} cases, no fault", flush=True)


if __name__ == "__main__":
    main()
