"""`/metrics`: the Prometheus text of this process and of those that share its port, summed.

Each process writes its samples to a file once a second, and whoever is asked adds up its own live ones and the others'
files. The counts of a process that died stay in the sum, or counters would run backwards; its gauges go.
"""

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.utils import floatToGoString

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WRITE_S = 1.0
_LIVE, _DEAD = ".live.json", ".dead.json"

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class SharedMetrics:
    """The metrics of all processes. Without a folder there is only this one."""

    def __init__(self, registry: CollectorRegistry, *, folder: Path | None = None) -> None:
        self._registry = registry
        self._folder = folder
        self._file = folder / f"{os.getpid()}{_LIVE}" if folder else None

    async def run(self) -> None:
        """Keep this process's file fresh, for ever. While it cannot be written, the others see the last one."""
        is_fresh = True
        while True:
            was_fresh, is_fresh = is_fresh, True
            try:
                self.write()
            except OSError as error:  # a full disk is no reason to end the streams of this process
                is_fresh = False
                if was_fresh:
                    logger.error(
                        "/metrics of the other processes misses news of this one: %s", error
                    )
            if is_fresh and not was_fresh:
                logger.info("/metrics of the other processes is complete again")
            await asyncio.sleep(WRITE_S)

    def write(self) -> None:
        """Write this process's file; readers see the old one or the new one."""
        if self._file is None:
            return
        rows = [
            [metric.type, sample.name, sample.labels, sample.value]
            for metric in self._registry.collect()
            for sample in metric.samples
        ]
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps(rows))
        draft.replace(self._file)

    def render(self, extra: Iterable[Metric] = ()) -> str:
        """The text of everything. `extra` metrics describe the fleet, not a process: they are not summed."""
        metrics = list(self._registry.collect())
        others = self._others()
        lines: list[str] = []
        for metric in metrics:
            lines += _lines(metric, others)
        for metric in extra:
            lines += _lines(metric, {})
        return "\n".join(lines) + "\n"

    def _others(self) -> Series:
        while True:
            try:
                return self._sum_others()
            except FileNotFoundError:
                continue  # a process was buried meanwhile: its file has another name now

    def _sum_others(self) -> Series:
        total: Series = {}
        files = sorted(self._folder.glob("*.json")) if self._folder else ()
        for path in files:
            if path == self._file:
                continue
            is_dead = path.name.endswith(_DEAD)
            for kind, name, labels, value in json.loads(path.read_text()):
                if is_dead and kind == "gauge":
                    continue
                key = (name, tuple(sorted(labels.items())))
                total[key] = total.get(key, 0.0) + value
        return total


def bury(folder: Path, pid: int) -> None:
    """Mark the file of a process that has ended, so that only its counts stay."""
    live = folder / f"{pid}{_LIVE}"
    if live.exists():
        live.replace(folder / f"{pid}{_DEAD}")


def _lines(metric: Metric, others: Series) -> list[str]:
    """A metric's text. TGI names its counters without `_total`, so those named tgi_* lose it."""
    name = metric.name
    if metric.type == "counter" and not name.startswith("tgi_"):
        name += "_total"
    own: Series = {}
    for sample in metric.samples:
        if not sample.name.endswith("_created"):
            own[(sample.name, tuple(sorted(sample.labels.items())))] = sample.value
    known = {metric.name + ending for ending in ("", "_total", "_bucket", "_sum", "_count")}
    keys = [*own, *(key for key in others if key[0] in known and key not in own)]
    lines = [f"# HELP {name} {metric.documentation}", f"# TYPE {name} {metric.type}"]
    for key in keys:
        shown = key[0]
        if metric.type == "counter" and shown.startswith("tgi_"):
            shown = shown.removesuffix("_total")
        value = floatToGoString(own.get(key, 0.0) + others.get(key, 0.0))
        lines.append(f"{shown}{_labels(key[1])} {value}")
    return lines


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))
        for name, value in labels
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
