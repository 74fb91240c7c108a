"""How much memory a process and its children take at their peak, and CPU, from `/proc`. Linux only.

PSS, sampled       what they hold, shared pages divided among those who share them. Pages of files
                   that are mapped count, those that were only read do not: they are the
                   kernel's cache, which it gives up as soon as anybody needs memory.
RSS, by the kernel the largest that each process ever had (VmHWM), added up. No peak is missed,
                   but pages that two of them share count twice and all peaks as one: an upper
                   bound.
available          by how much the machine's MemAvailable fell: everything, other processes too.
"""

import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """In bytes."""

    pss: int
    rss: int
    fall_of_available: int

    @property
    def facts(self) -> dict[str, int]:
        return asdict(self)


class MemoryWatch:
    """Samples `pid` and its descendants while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._available_before = self._least_available = available_bytes()
        self._pss = 0
        self._rss: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    @property
    def peak(self) -> MemoryPeak:
        """So far."""
        fall = self._available_before - self._least_available
        return MemoryPeak(self._pss, sum(self._rss.values()), fall)

    def _run(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        pss = 0
        for pid in _family(self._pid):
            pss += _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") * 1024
            rss = _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM") * 1024
            self._rss[pid] = max(rss, self._rss.get(pid, 0))
        self._pss = max(self._pss, pss)
        self._least_available = min(self._least_available, available_bytes())


def cpu_seconds(pid: int) -> float:
    """Of `pid` and all its descendants that live, since their starts."""
    ticks = 0
    for one in _family(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def total_bytes() -> int:
    """Memory of this machine."""
    return _kilobytes(Path("/proc/meminfo"), "MemTotal") * 1024


def available_bytes() -> int:
    """What could be had now, the kernel's file cache included."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def _family(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _kilobytes(file: Path, field: str) -> int:
    """A line `Field:  123 kB`; 0 for a process that is gone."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
