"""A campaign as a table for people, one line of JSON for machines, and a page for the repository."""

import json
import statistics
from collections import Counter

from tests.chaos.campaign import Campaign, Cell

_HEAD = (
    "fault",
    "phase",
    "runs",
    "hit",
    "streams",
    "lost",
    "repeated",
    "changed",
    "stuck",
    "other",
    "gap p50 s",
    "p95",
    "max",
    "explicit errors",
)
_NAMED = ("lost", "repeated", "changed", "stuck")


def rows(campaign: Campaign) -> list[list[str]]:
    """One row for each cell, and a sum."""
    cells = [campaign.cells[name] for name in sorted(campaign.cells)]
    total = Cell("all", "")
    for cell in cells:
        for name in ("runs", "reached", "streams", "faults", "refusals"):
            setattr(total, name, getattr(total, name) + getattr(cell, name))
        total.wrong += cell.wrong
        total.errors += cell.errors
        total.gaps_s += cell.gaps_s
    return [_row(cell) for cell in (*cells, total)]


def _row(cell: Cell) -> list[str]:
    other = sum(cell.wrong.values()) - sum(cell.wrong[name] for name in _NAMED)
    gaps = sorted(cell.gaps_s) or [0.0]
    p95 = gaps[min(len(gaps) - 1, round(0.95 * (len(gaps) - 1)))]
    errors = ", ".join(f"{count} {kind}" for kind, count in cell.errors.items()) or "none"
    numbers = (cell.runs, cell.reached, cell.streams, *(cell.wrong[name] for name in _NAMED), other)
    times = (statistics.median(gaps), p95, gaps[-1])
    return [
        cell.fault,
        cell.phase,
        *map(str, numbers),
        *(f"{seconds:.2f}" for seconds in times),
        errors,
    ]


def table(campaign: Campaign) -> str:
    """In columns."""
    lines = [list(_HEAD), *rows(campaign)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary(campaign: Campaign, *, seconds: float) -> str:
    """One line of JSON."""
    wrong: Counter = sum((cell.wrong for cell in campaign.cells.values()), Counter())
    errors: Counter = sum((cell.errors for cell in campaign.cells.values()), Counter())
    return json.dumps(
        {
            "seed": campaign.seed,
            "seconds": round(seconds),
            "streams": sum(cell.streams for cell in campaign.cells.values()),
            "faults": sum(cell.faults for cell in campaign.cells.values()),
            "cells": len(campaign.cells),
            "wrong": wrong,
            "errors": errors,
            "processes_ended_by_themselves": len(campaign.ended),
        }
    )


def page(campaign: Campaign, *, seconds: float) -> str:
    """Markdown for deploy/reliability.md."""
    body = rows(campaign)
    lines = [
        "# No client loses or repeats a token: the proof",
        "",
        (
            "Made by `python -m tests.chaos "
            f"--seconds {seconds:.0f} --seed {campaign.seed} --report deploy/reliability.md`: gateways, workers and a broker as "
            "processes, a proxy between them, and clients that check every token. The workers' models differ on purpose, so a "
            "stream that was silently continued with another text shows. Phases: P0 before the reply of ENQUEUE, P1 queued, "
            "P2 leased, P3 mid-stream, P4 before the terminal frame, P5 terminal frame written but not read, P6 being resumed. "
            "`hit` counts the runs in which the fault met that phase. An explicit `stream_diverged` is allowed only where the "
            "broker lost data; every other error counts as other."
        ),
        "",
        f"| {' | '.join(_HEAD)} |",
        f"|{'---|' * len(_HEAD)}",
        *(f"| {' | '.join(row)} |" for row in body),
        "",
        f"Processes that ended by themselves: {len(campaign.ended)}.",
        "",
    ]
    return "\n".join(lines)
