"""`python -m tests.chaos --seconds 600 --seed 1`: break a fleet in every way, and see whether a client notices."""

import asyncio
import time
from pathlib import Path

import click

from tests.chaos.campaign import Campaign
from tests.chaos.faults import FAULTS
from tests.chaos.phases import PHASES
from tests.chaos.report import page, summary, table


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="Of the whole run.")
@click.option("--seed", default=1, show_default=True, help="Draws order and times.")
@click.option(
    "--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Only these."
)
@click.option("--phase", "phases", multiple=True, type=click.Choice(PHASES), help="Only these.")
@click.option(
    "--storm-share", default=0.25, show_default=True, help="Of the time, for random times."
)
@click.option("--report", type=click.Path(path_type=Path), help="Write the table as Markdown.")
def main(
    seconds: float,
    seed: int,
    faults: tuple[str, ...],
    phases: tuple[str, ...],
    storm_share: float,
    report: Path | None,
) -> None:
    """Run a campaign; exit with 1 if an invariant was broken."""
    campaign = Campaign(seed, say=lambda text: click.echo(text, err=True))

    async def run() -> None:
        await campaign.run_matrix(
            until=time.monotonic() + seconds * (1 - storm_share),
            faults=list(faults) or None,
            phases=phases or PHASES,
        )
        if storm_share:
            await campaign.run_storm(seconds=seconds * storm_share)

    asyncio.run(run())
    click.echo(table(campaign))
    details = [text for cell in campaign.cells.values() for text in cell.details]
    for text in (*details, *campaign.ended):
        click.echo(f"WRONG {text}")
    click.echo(summary(campaign, seconds=seconds))
    if report:
        report.write_text(page(campaign, seconds=seconds))
    raise SystemExit(0 if campaign.is_sound else 1)


if __name__ == "__main__":
    main()
