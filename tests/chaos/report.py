"""Outcomes as a table for people and as a page for the repository."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from tests.chaos.campaign import STORM
from tests.chaos.faults import FAULTS
from tests.chaos.phases import PHASES
from tests.chaos.results import Outcome, summary

_NAMED = ("lost", "repeated", "changed", "stuck")
HEAD = ("fault", *PHASES, "streams", *_NAMED, "other", "gap p50 s", "p95", "max", "explicit errors")


def rows(outcomes: Iterable[Outcome]) -> list[list[str]]:
    """A row for each fault, with `hits/runs` of each phase, and a sum."""
    order = [*FAULTS, STORM]
    outcomes = sorted(outcomes, key=lambda outcome: order.index(outcome.fault))
    groups = [(name, list(group)) for name, group in groupby(outcomes, lambda o: o.fault)]
    return [_row(name, group) for name, group in (*groups, ("all", outcomes))]


def _row(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    wrong: Counter[str] = sum((outcome.wrong for outcome in outcomes), Counter())
    errors: Counter[str] = sum((outcome.errors for outcome in outcomes), Counter())
    gaps = sorted(gap for outcome in outcomes for gap in outcome.gaps_s) or [0.0]
    p95 = gaps[min(len(gaps) - 1, round(0.95 * (len(gaps) - 1)))]
    counts = [wrong[kind] for kind in _NAMED]
    other = sum(wrong.values()) - sum(counts) + sum(len(outcome.ended) for outcome in outcomes)
    return [
        name,
        *(_hits([outcome for outcome in outcomes if outcome.phase == phase]) for phase in PHASES),
        str(sum(outcome.num_streams for outcome in outcomes)),
        *map(str, (*counts, other)),
        *(f"{seconds:.2f}" for seconds in (statistics.median(gaps), p95, gaps[-1])),
        ", ".join(f"{count} {kind}" for kind, count in sorted(errors.items())) or "none",
    ]


def _hits(outcomes: Sequence[Outcome]) -> str:
    return f"{sum(outcome.is_hit for outcome in outcomes)}/{len(outcomes)}" if outcomes else ""


def table(outcomes: Iterable[Outcome]) -> str:
    """In columns."""
    lines = [list(HEAD), *rows(outcomes)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(outcomes: Sequence[Outcome], *, code: str) -> str:
    """The section of deploy/reliability.md that a campaign makes."""
    sums = summary(outcomes)
    seeds = ", ".join(map(str, sums["seeds"]))
    return "\n".join(
        [
            (
                f"{sums['runs']} runs of {sums['cells']} cells, seeds {seeds}, code `{code}`: "
                f"{sums['streams']} streams, {sums['faults']} faults, "
                f"{sums['processes_ended_by_themselves']} processes that ended by themselves."
            ),
            "",
            f"| {' | '.join(HEAD)} |",
            f"|{'---|' * len(HEAD)}",
            *(f"| {' | '.join(row)} |" for row in rows(outcomes)),
        ]
    )


def replace_section(page: str, name: str, text: str) -> str:
    """`page` with what stands between the marks of section `name` replaced."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"the page has no section between {first.strip()!r} and {last!r}")
    return f"{before}{first}\n{text}\n\n{last}{after}"
