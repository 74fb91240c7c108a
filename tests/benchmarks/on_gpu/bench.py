"""What a question about a GPU is, and how it takes times. Knows no question.

A question is a function that gets a `Bench` and returns rows of a table. It asserts nothing about
speed; what is plainly wrong it raises as `Wrong`, and what cannot be asked here as `Unanswered`.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch

Rows = list[dict[str, object]]
"""One finding each; all of a question have the same columns."""


class Wrong(Exception):
    """The device, or our code on it, computes something else. `rows` is what was found."""

    def __init__(self, reason: str, rows: Rows | None = None) -> None:
        super().__init__(reason)
        self.rows = rows or []


class Unanswered(Wrong):
    """This machine lacks what the question, or a part of it, is about."""


class Outcome(StrEnum):
    """What became of a question."""

    ANSWERED = "answered"
    UNANSWERED = "unanswered"  # no fault of ours
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a question came to."""

    name: str
    outcome: Outcome
    reason: str
    rows: tuple[dict[str, object], ...]
    took_s: float

    @property
    def is_failure(self) -> bool:
        return self.outcome in (Outcome.WRONG, Outcome.FAILED)

    @property
    def facts(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, facts: dict[str, object]) -> "Finding":
        """The inverse of `facts`."""
        outcome = Outcome(facts["outcome"])
        return cls(facts["name"], outcome, facts["reason"], tuple(facts["rows"]), facts["took_s"])


@dataclass(frozen=True, slots=True)
class Question:
    """`ask` is given at most `limit_s` seconds; `number` is that in the list of open questions."""

    name: str
    number: str
    ask: Callable[["Bench"], Rows]
    limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Bench:
    """A device, and sizes that it deserves: with `is_small` everything shrinks to almost nothing, so
    that tests can run every line on a CPU."""

    device: torch.device
    is_small: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, size: int, small: int) -> int:
        return small if self.is_small else size

    def need_cuda(self, what: str) -> None:
        """Raises Unanswered on a CPU."""
        if not self.is_cuda:
            raise Unanswered(f"{what} needs CUDA")

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)

    def time_us(self, run: Callable[[], object], *, repeats: int = 20, calls: int = 10) -> float:
        """Microseconds of one call: the median of `repeats` groups of `calls`, after a warm-up."""
        repeats, calls = (2, 1) if self.is_small else (repeats, calls)
        for _ in range(3):
            run()
        self.synchronize()
        times = []
        for _ in range(repeats):
            started_at = time.perf_counter()
            for _ in range(calls):
                run()
            self.synchronize()
            times.append((time.perf_counter() - started_at) / calls)
        return 1e6 * statistics.median(times)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run` as one CUDA graph; on a CPU `run` itself."""
        if not self.is_cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is built at the first calls must not be captured
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def finding_of(question: Question, bench: Bench) -> Finding:
    """Ask; whatever goes wrong is a finding too."""
    started_at = time.monotonic()
    rows: Rows = []
    outcome, reason = Outcome.ANSWERED, ""
    try:
        rows = question.ask(bench)
    except Wrong as error:
        outcome = Outcome.UNANSWERED if isinstance(error, Unanswered) else Outcome.WRONG
        reason, rows = str(error), error.rows
    except Exception as error:  # noqa: BLE001, the others are still to be asked
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        outcome, reason = Outcome.FAILED, f"{type(error).__name__} at {place}: {error}"
    return Finding(question.name, outcome, reason, tuple(rows), time.monotonic() - started_at)


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
