"""Break a fleet in every way, and see whether a client notices.

python -m tests.chaos --seeds 1,2,3 --results FILE            the whole matrix; goes on where FILE ends
python -m tests.chaos --seeds 2 --fault "disk full" --phase P4     one cell again
python -m tests.chaos --results FILE --no-run --report deploy/reliability.md
"""

import asyncio
import json
import time
from pathlib import Path

import click

from tests.chaos.campaign import STORM, Campaign, matrix
from tests.chaos.faults import FAULTS
from tests.chaos.phases import PHASES
from tests.chaos.report import markdown, replace_section, table
from tests.chaos.results import Outcome, append, code_digest, load, summary


def _seeds(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default="1", callback=_seeds, help="Draw order and times; as 1,2,3.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)))
@click.option("--phase", "phases", multiple=True, type=click.Choice(PHASES))
@click.option("--seconds", type=float, help="Begin no cell after so long; the default is no limit.")
@click.option("--storm-s", default=0.0, help="Then faults at random times, so long for each seed.")
@click.option("--results", type=click.Path(path_type=Path), help="File of outcomes, added to.")
@click.option("--run/--no-run", "is_run", default=True, help="Or only tell what is in the file.")
@click.option("--report", type=click.Path(path_type=Path), help="Page whose section to replace.")
def main(
    seeds: list[int],
    faults: tuple[str, ...],
    phases: tuple[str, ...],
    seconds: float | None,
    storm_s: float,
    results: Path | None,
    is_run: bool,
    report: Path | None,
) -> None:
    """Run cells that are not in the file yet; exit with 1 if an invariant was broken."""
    code = code_digest()
    outcomes = load(results, code) if results else []
    known = {outcome.name for outcome in outcomes}
    until = time.monotonic() + (seconds or float("inf"))

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if results:
            append(results, code, outcome)

    async def run() -> None:
        campaign = Campaign(say=_say)
        names = matrix(seeds, faults=faults or FAULTS, phases=phases or PHASES)
        async for outcome in campaign.run([n for n in names if n not in known], until=until):
            keep(outcome)
        for seed in seeds if storm_s else ():
            if (STORM, "any", seed) not in known:
                keep(await campaign.run_storm(seed, seconds=storm_s))

    if is_run:
        asyncio.run(run())
    click.echo(table(outcomes))
    for outcome in outcomes:
        for text in (*outcome.details, *outcome.ended):
            click.echo(f"WRONG {text}")
    click.echo(json.dumps({"code": code, **summary(outcomes)}))
    if report:
        text = markdown(outcomes, code=code)
        report.write_text(replace_section(report.read_text(), "matrix", text))
    raise SystemExit(0 if all(outcome.is_sound for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
