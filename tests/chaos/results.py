"""What came of a run of a cell, as lines of JSON in a file that grows: a campaign can stop and go on, on several processors.

Lines belong to the code that made them, named by its digest; those of other code are left alone and not counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from tests.chaos.client import Observation
from tests.simulation.streams import Says, violations

ROOT = Path(__file__).parents[2]
_CODE = ("common", "gateway", "worker", "tests/chaos", "tests/simulation/streams.py")


@dataclass(slots=True)
class Outcome:
    """One fault in one phase with one seed."""

    fault: str
    phase: str
    seed: int
    is_hit: bool = False  # the fault met the phase that was meant
    num_streams: int = 0
    num_faults: int = 0
    num_refusals: int = 0
    seconds: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # longest of each stream
    wrong: Counter[str] = field(default_factory=Counter)  # lost, repeated, changed, stuck, ...
    errors: Counter[str] = field(default_factory=Counter)  # explicit errors by kind
    details: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # processes that ended by themselves

    @property
    def name(self) -> tuple[str, str, int]:
        return self.fault, self.phase, self.seed

    @property
    def is_sound(self) -> bool:
        return not self.wrong and not self.ended

    def add(
        self,
        seen: Observation,
        salts: list[str],
        *,
        allowed: frozenset[str],
        says: Says | None = None,
    ) -> None:
        """Judge what a client saw."""
        self.num_streams += 1
        self.num_refusals += seen.refusals
        if seen.longest_gap_s:
            self.gaps_s.append(round(seen.longest_gap_s, 3))
        for text in (*violations(seen.seen, salts, says), *seen.problems):
            self.blame(f"{text} ({seen.seen.request.id})")
        if seen.seen.error:
            self.errors[seen.seen.error] += 1
            if seen.seen.error not in allowed:
                self.blame(f"error: {seen.seen.error} {seen.message!r} ({seen.seen.request.id})")

    def blame(self, text: str) -> None:
        """Note what must not be; its first word says what kind of wrong it is."""
        self.wrong[text.partition(":")[0]] += 1
        self.details.append(f"{self.fault} {self.phase} seed {self.seed}: {text}")


def code_digest() -> str:
    """Names the code of fleet and harness."""
    digest = hashlib.blake2b(digest_size=8)
    for place in _CODE:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".lua"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def append(path: Path, code: str, outcome: Outcome) -> None:
    """One line, in one write: several campaigns may share a file."""
    row = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"code": code, **row}) + "\n")


def load(path: Path, code: str) -> list[Outcome]:
    """The outcomes of this code; of several with one name the last."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    outcomes = [_outcome(row) for row in rows if row.pop("code") == code]
    return list({outcome.name: outcome for outcome in outcomes}.values())


def _outcome(row: dict) -> Outcome:
    row |= {"wrong": Counter(row["wrong"]), "errors": Counter(row["errors"])}
    return Outcome(**row)


def summary(outcomes: Iterable[Outcome]) -> dict[str, object]:
    """Sums, for machines."""
    outcomes = list(outcomes)
    return {
        "runs": len(outcomes),
        "cells": len({outcome.name[:2] for outcome in outcomes}),
        "seeds": sorted({outcome.seed for outcome in outcomes}),
        "streams": sum(outcome.num_streams for outcome in outcomes),
        "faults": sum(outcome.num_faults for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "wrong": dict(sum((outcome.wrong for outcome in outcomes), Counter())),
        "errors": dict(sum((outcome.errors for outcome in outcomes), Counter())),
        "processes_ended_by_themselves": sum(len(outcome.ended) for outcome in outcomes),
    }
