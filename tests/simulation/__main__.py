"""`python -m tests.simulation`: play many histories, or one again. Prints the seed of each that went wrong.

python -m tests.simulation --histories 1000
python -m tests.simulation --scenario everything --seed 1234 --histories 1 --verbose
"""

import logging
import time
from collections import Counter

import click

from tests.simulation.lua import Lua
from tests.simulation.scenarios import SCENARIOS
from tests.simulation.streams import violations
from tests.simulation.world import World


@click.command()
@click.option("--scenario", type=click.Choice(list(SCENARIOS)), help="Only this one.")
@click.option("--seed", default=0, show_default=True, help="Of the first history.")
@click.option("--histories", default=100, show_default=True, help="Of each scenario.")
@click.option("--verbose", is_flag=True, help="Tell what happened.")
def main(scenario: str | None, seed: int, histories: int, verbose: bool) -> None:
    """Play simulated histories; exit with 1 if one broke an invariant."""
    logging.disable(logging.CRITICAL)
    lua, num_bad = Lua(), 0
    for name in [scenario] if scenario else SCENARIOS:
        totals, started = Counter(), time.perf_counter()
        for number in range(seed, seed + histories):
            world = World(number, SCENARIOS[name], lua)
            streams = world.run()
            problems = [
                f"{stream.request.id}: {text}"
                for stream in streams
                for text in violations(stream, world.salts)
            ] + [f"a worker ended by itself: {text}" for text in world.died]
            totals.update(stream.error for stream in streams if stream.error)
            totals.update(streams=len(streams), commands=world.network.num_commands)
            if problems:
                num_bad += 1
                click.echo(f"{name}, seed {number}: {'; '.join(problems)}")
            if verbose:
                click.echo("\n".join(world.log))
        seconds = time.perf_counter() - started
        click.echo(
            f"{name:24} {histories} histories, {seconds:.1f} s, {dict(totals)}, "
            f"{totals['commands'] / seconds:.0f} commands/s"
        )
    raise SystemExit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
