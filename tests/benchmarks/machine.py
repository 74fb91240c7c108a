"""Names the machine that a benchmark ran on: a number without it cannot be compared. Reads only
`/proc` and tools.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides speed, and how busy it was when the benchmark began."""

    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    gpus: tuple[str, ...]  # name and memory, as nvidia-smi tells
    torch: str | None  # version, None where it is not installed
    python: str
    load_average: (
        float  # runnable threads over the last minute: above 0.5, others disturbed the numbers
    )

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB", *self.gpus]
        parts += [f"torch {self.torch}"] if self.torch else []
        busy = f" (busy: load average {self.load_average:.1f})" if self.load_average > 0.5 else ""
        return "; ".join(parts) + busy


def machine() -> Machine:
    """This machine, now."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        memory_gib=round(memory_bytes / 2**30, 1),
        gpus=_gpus(),
        torch=_version("torch"),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return tuple(done.stdout.strip().splitlines()) if done.returncode == 0 else ()


def _version(package: str) -> str | None:
    """Asks the metadata: importing torch would cost this process seconds and memory."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
