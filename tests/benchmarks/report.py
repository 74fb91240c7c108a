"""From records to numbers, from numbers to a table and JSON facts. Knows neither HTTP nor how the
load was made.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.client import RequestRecord

MILLI = 1000.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of a sample, in milliseconds; NaN when the sample is empty."""

    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values: Iterable[float]) -> "Distribution":
        ordered = sorted(value * MILLI for value in values)
        points = [percentile(ordered, share) for share in (0.5, 0.9, 0.99)]
        return cls(*points, max=ordered[-1] if ordered else math.nan)


@dataclass(frozen=True, slots=True)
class Level:
    """One concurrency or one rate, measured. Only requests without an error count into tokens and
    latencies.
    """

    unit: str  # "users" or "requests/s"
    value: float
    num_requests: int  # that ended well
    errors: dict[str, int]  # kind: count
    error_examples: dict[str, str]  # kind: message of the first one
    wall_s: float  # from the start of the level to its last answer
    output_tokens: int
    prompt_tokens: (
        int | None
    )  # of one request, by the server's count; None when it gave none or they differ
    first_token_ms: Distribution
    gap_ms: Distribution  # between neighbouring token events, all requests together
    token_ms: Distribution  # a request's mean time of a token after its first
    whole_ms: Distribution
    send_lag_ms: Distribution  # how late this generator itself was
    client_cores: float  # CPU seconds of this process per second of wall clock

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON: every number, NaN as null."""
        derived = {"tokens_per_s": self.tokens_per_s, "requests_per_s": self.requests_per_s}
        return plain(asdict(self) | derived)


def summarize(
    records: Sequence[RequestRecord], *, unit: str, value: float, wall_s: float, client_cpu_s: float
) -> Level:
    """The numbers of one level."""
    good = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    answered = [record for record in good if record.token_times]
    decoded = [record for record in answered if record.num_tokens > 1]
    prompt_tokens = {record.prompt_tokens for record in good}
    return Level(
        unit=unit,
        value=value,
        num_requests=len(good),
        errors=dict(Counter(record.error for record in failed)),
        error_examples={record.error: record.message for record in reversed(failed)},
        wall_s=wall_s,
        output_tokens=sum(record.num_tokens for record in good),
        prompt_tokens=prompt_tokens.pop() if len(prompt_tokens) == 1 else None,
        first_token_ms=Distribution.of_seconds(record.first_token_s for record in answered),
        gap_ms=Distribution.of_seconds(gap for record in answered for gap in record.gaps_s),
        token_ms=Distribution.of_seconds(
            (record.token_times[-1] - record.token_times[0]) / (record.num_tokens - 1)
            for record in decoded
        ),
        whole_ms=Distribution.of_seconds(record.whole_s for record in good),
        send_lag_ms=Distribution.of_seconds(
            record.sent_at - record.intended_at for record in records
        ),
        client_cores=client_cpu_s / wall_s if wall_s > 0 else 0.0,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ascending sample lies, linear between neighbours (as
    NumPy's default).
    """
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def table(levels: Sequence[Level]) -> str:
    """One row a level, aligned, with a line of advice where a number should not be trusted."""
    groups = [("first token ms", 3), ("between tokens ms", 4), ("whole answer ms", 3)]
    left = ["load", "requests", "failed", "tokens/s"]
    rows = [
        [
            *left,
            "p50",
            "p90",
            "p99",
            "p50",
            "p90",
            "p99",
            "max",
            "p50",
            "p90",
            "p99",
            "client cores",
        ]
    ]
    for level in levels:
        first, gap, whole = level.first_token_ms, level.gap_ms, level.whole_ms
        times = [first.p50, first.p90, first.p99, gap.p50, gap.p90, gap.p99, gap.max]
        times += [whole.p50, whole.p90, whole.p99]
        head = [
            f"{level.value:g} {level.unit}",
            str(level.num_requests),
            str(sum(level.errors.values())),
        ]
        cells = [f"{level.tokens_per_s:.1f}", *map(_ms, times), f"{level.client_cores:.2f}"]
        rows.append(head + cells)
    starts, start = [], len(left)
    for _, size in groups:
        starts.append(start)
        start += size
    lines = aligned(rows, extra_space_before={*starts, start})
    header = _group_header(lines[0], groups)
    return "\n".join([header, *lines, "", *_remarks(levels)]).rstrip() + "\n"


def aligned(rows: Sequence[Sequence[str]], *, extra_space_before: Iterable[int] = ()) -> list[str]:
    """Rows as text with right-aligned columns, a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gaps = [4 if index in set(extra_space_before) else 2 for index in range(len(widths))]
    lines = [
        "".join(
            " " * gap + cell.rjust(width)
            for cell, width, gap in zip(row, widths, gaps, strict=True)
        )
        for row in rows
    ]
    return [lines[0], "  " + "─" * (max(map(len, lines)) - 2), *lines[1:]]


def plain(value: Any) -> Any:
    """The value with NaN as None and floats of five digits, so that JSON readers take it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return value


def _group_header(columns: str, groups: list[tuple[str, int]]) -> str:
    """A line that names each group above its first column (a group opens with "p50")."""
    header, at = "", 0
    for name, _ in groups:
        at = columns.index("p50", at)
        header = header.ljust(max(at - 3, len(header) + 2)) + name
        at += 3
    return header


def _ms(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _remarks(levels: Sequence[Level]) -> list[str]:
    remarks = []
    for level in levels:
        name = f"{level.value:g} {level.unit}"
        for kind, count in level.errors.items():
            remarks.append(f"  {name}: {count} x {kind}. {level.error_examples[kind]}".rstrip())
        if level.client_cores > 0.5 and level.num_requests:
            remarks.append(
                f"  {name}: this client used {level.client_cores:.2f} cores; it may be the limit."
            )
        if level.send_lag_ms.p99 > 10:
            remarks.append(f"  {name}: this client sent late, p99 {level.send_lag_ms.p99:.0f} ms.")
    return remarks
