"""How fast a sharded worker loads, beside plain reading of the same files, and what memory it takes.

    python -m tests.benchmarks.loading --size-gib 2
    python -m tests.benchmarks.loading --share-of-memory 0.505 --rounds 1     # more than half of it

Random bfloat16 weights in the shape of Llama are written to the disk, then loaded by a real worker
(`tokenfleet worker --num-shard 2`) and read by one loop through one buffer, in turns. Before a cold
round the kernel forgets the files; before a warm one it has read them. Then it waits until the
memory that this freed is fresh again. How fast fresh memory can be had is measured, too: a load
needs as much of it as the weights take. A load's time is from the first shard's log line to the
last shard's weights being in memory and packed.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from common.broker import start_broker
from common.child import Child, describe_exit
from tests.benchmarks.fresh_memory import fresh_memory_s
from tests.benchmarks.machine import machine
from tests.benchmarks.memory_peak import MemoryPeak, MemoryWatch, cpu_seconds, total_bytes
from tests.benchmarks.random_checkpoint import write_checkpoint

BUFFER_BYTES = 2**20  # of plain reading; as `dd bs=1M`
MOST_OF_MEMORY = 0.6
LEAST_SPEED = 0.7  # of plain reading
LOAD_TIMEOUT_S = 900.0
# Memory that was freed goes back to a virtual machine's host within seconds, and costs several times
# as much to get again. Reading at once would have the memory of the file cache that was just
# dropped; no load is as quick.
SETTLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Round:
    """Fresh memory, plain reading and a load, with the kernel's file cache in the same state."""

    is_cold: bool
    memory_s: float  # for as much memory as the weights take
    read_s: float
    load_s: float
    load_cpu_s: float  # of all shards and threads together
    peak: MemoryPeak


@click.command(context_settings={"show_default": True})
@click.option("--size-gib", default=2.0, help="Size of the checkpoint.")
@click.option(
    "--share-of-memory", type=float, help="The same, as a share of this machine's memory."
)
@click.option("--num-shard", default=2)
@click.option("--rounds", default=3, help="Of each kind.")
@click.option("--kinds", default="cold,warm", help="States of the file cache: cold, warm or both.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where to write.")
def main(
    size_gib: float,
    share_of_memory: float | None,
    num_shard: int,
    rounds: int,
    kinds: str,
    folder: Path | None,
) -> None:
    """Measure; print a table, then one line of JSON. Exits with 1 when a limit was not kept."""
    host = machine()
    memory_bytes = total_bytes()
    num_bytes = int(size_gib * 2**30 if share_of_memory is None else share_of_memory * memory_bytes)
    with tempfile.TemporaryDirectory(prefix="tokenfleet-loading-", dir=folder) as name:
        model = Path(name)
        num_bytes = write_checkpoint(model, num_bytes)
        click.echo(f"{host.line}\n{num_bytes / 2**30:.2f} GiB of weights, {num_shard} shards\n")
        states = [kind == "cold" for _ in range(rounds) for kind in kinds.split(",")]
        done = [one_round(model, num_bytes, num_shard, is_cold=is_cold) for is_cold in states]
    click.echo(table(done, num_bytes, memory_bytes))
    failures = shortcomings(done, memory_bytes)
    facts = {"num_bytes": num_bytes, "num_shard": num_shard, "memory_bytes": memory_bytes}
    facts |= {"rounds": [_facts(one) for one in done], "failures": failures}
    click.echo("\n".join(["", *failures]))
    click.echo(json.dumps({"benchmark": "loading", "machine": host.facts} | facts))
    sys.exit(1 if failures else 0)


def one_round(model: Path, num_bytes: int, num_shard: int, *, is_cold: bool) -> Round:
    """Take memory, read, load; each in the same state."""
    files = sorted(model.glob("*.safetensors"))

    def settle() -> None:
        _set_cache(files, is_cold)
        time.sleep(SETTLE_S)

    settle()
    memory_s = fresh_memory_s(num_bytes, num_shard)
    settle()
    read_s = plain_reading_s(files)
    settle()
    return Round(is_cold, memory_s, read_s, *worker_loading(model, num_shard))


def plain_reading_s(files: Sequence[Path]) -> float:
    """Seconds that one loop needs to read all files through one buffer."""
    buffer = bytearray(BUFFER_BYTES)
    started_at = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started_at


def worker_loading(model: Path, num_shard: int) -> tuple[float, float, MemoryPeak]:
    """Seconds that a worker's shards need for their weights, of the clock and of the CPU, and the
    memory of all its processes up to the moment when it can serve."""
    with tempfile.TemporaryDirectory(prefix="tokenfleet-bench-") as folder:
        broker = start_broker(Path(folder), port=0)
        try:
            arguments = ["worker", "--model-id", str(model), "--redis-url", broker.url]
            arguments += ["--num-shard", str(num_shard), "--device", "cpu", "--dtype", "bfloat16"]
            arguments += ["--max-total-tokens", "1024", "--max-batch-total-tokens", "4096"]
            return _load([sys.executable, "-m", "common.cli", *arguments])
        finally:
            broker.stop()


def _load(command: list[str]) -> tuple[float, float, MemoryPeak]:
    with _logging_child(command) as (child, log), MemoryWatch(child.pid) as watch:
        started_at = log.time_of("Loading ", child)
        cpu_s = cpu_seconds(child.pid)
        loaded_at = log.time_of("loaded ", child)
        cpu_s = cpu_seconds(child.pid) - cpu_s
        log.time_of("ready", child)
    return loaded_at - started_at, cpu_s, watch.peak


class TimedLog:
    """Lines of a child, with the time at which they came."""

    def __init__(self, reading: int) -> None:
        self._lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread.start()

    def time_of(self, text: str, child: Child) -> float:
        """When the first line with `text` came, once it is there."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        with self._changed:
            while True:
                for at, line in self._lines:
                    if text in line:
                        return at
                code = child.exit_code
                if code is not None or time.monotonic() > deadline:
                    lines = "\n".join(line for _, line in self._lines[-20:])
                    how = "is late" if code is None else describe_exit(code)
                    raise click.ClickException(f"the worker {how}, without {text!r}:\n{lines}")
                self._changed.wait(0.5)

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, errors="replace") as stream:
            for line in stream:
                with self._changed:
                    self._lines.append((time.perf_counter(), line.rstrip()))
                    self._changed.notify_all()


@contextmanager
def _logging_child(command: list[str]) -> Iterator[tuple[Child, TimedLog]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as output:
        child = Child(command, output=output)
    try:
        yield child, TimedLog(reading)
    finally:
        child.terminate()
        with suppress(TimeoutError):
            child.wait(30)
        child.kill()


def _set_cache(files: Sequence[Path], is_cold: bool) -> None:
    """Let the kernel forget the files, or read them."""
    for file in files:
        with file.open("rb") as stream:
            if is_cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not is_cold:
        plain_reading_s(files)


def table(rounds: Sequence[Round], num_bytes: int, memory_bytes: int) -> str:
    """Markdown, medians of speeds and peaks of memory."""
    columns = ["files", "fresh memory, GB/s", "plain reading, GB/s", "load, GB/s", "ratio"]
    columns += ["CPU, s a GB"]
    columns += ["memory at the peak: PSS", "RSS"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for is_cold in sorted({one.is_cold for one in rounds}, reverse=True):
        these = [one for one in rounds if one.is_cold == is_cold]
        memory, read, load = _medians(these)
        pss = max(one.peak.pss for one in these)
        rss = max(one.peak.rss for one in these)
        sizes = [f"{size / 2**30:.2f} GiB, {size / memory_bytes:.1%}" for size in (pss, rss)]
        cells = ["cold" if is_cold else "warm"]
        cells += [f"{num_bytes / seconds / 1e9:.2f}" for seconds in (memory, read, load)]
        cpu = statistics.median(one.load_cpu_s for one in these) / num_bytes * 1e9
        cells += [f"{read / load:.0%}", f"{cpu:.2f}", *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shortcomings(rounds: Sequence[Round], memory_bytes: int) -> list[str]:
    """Which limits were not kept. Speed counts from a cold cache, as at a start."""
    failures = []
    cold = [one for one in rounds if one.is_cold]
    if cold:
        _, read, load = _medians(cold)
        if read / load < LEAST_SPEED:
            failures.append(f"missed: {read / load:.0%} of plain reading, not {LEAST_SPEED:.0%}")
    share = max(one.peak.rss for one in rounds) / memory_bytes
    if share > MOST_OF_MEMORY:
        failures.append(f"missed: {share:.1%} of memory at the peak, not {MOST_OF_MEMORY:.0%}")
    return failures


def _medians(rounds: Sequence[Round]) -> list[float]:
    """Seconds for fresh memory, for plain reading and for loading."""
    times = zip(*((one.memory_s, one.read_s, one.load_s) for one in rounds), strict=True)
    return [statistics.median(column) for column in times]


def _facts(one: Round) -> dict[str, object]:
    times = {
        "memory_s": one.memory_s,
        "read_s": one.read_s,
        "load_s": one.load_s,
        "load_cpu_s": one.load_cpu_s,
    }
    return {"is_cold": one.is_cold} | times | one.peak.facts


if __name__ == "__main__":
    main()
