"""What the machine leaves to this process: memory and cores, within its control groups.

A limit may stand at the process's own group or at any above it, so all are read, up to the root.
Version 2 has one tree of groups, version 1 one for each controller. A container sees its own group
as the root of a tree, even where /proc names it by its place on the host.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Of the memory in all. What is less is left to the sequences that run, and to other processes.
SPARE_SHARE = 0.1

# Limit and use of a group, and what of the use is file cache that the kernel drops for the asking.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Of the machine or of a control group."""

    total_bytes: int
    free_bytes: int


def available_memory_bytes(root: Path = ROOT) -> int:
    """What this process may still take. `root` is that of the file system."""
    return min(limit.free_bytes for limit in _memory_limits(root))


def has_spare_memory(root: Path = ROOT) -> bool:
    """Whether there is more than this process should keep free; takes milliseconds at worst."""
    return all(limit.free_bytes > SPARE_SHARE * limit.total_bytes for limit in _memory_limits(root))


def num_usable_cores(root: Path = ROOT) -> int:
    """On how many cores this process may run at once; a quota of one and a half is two."""
    quotas = [_cpu_quota(group) for group in _groups(root, "cpu")]
    has_affinity = hasattr(os, "sched_getaffinity")  # not outside Linux
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min([cores, *(quota for quota in quotas if quota)])


def _memory_limits(root: Path) -> Iterator[MemoryLimit]:
    if machine := _fields(root / "proc/meminfo"):
        yield MemoryLimit(machine["MemTotal"] * 1024, machine["MemAvailable"] * 1024)
    else:  # not Linux: what is free is not told, half is a guess
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield MemoryLimit(total_bytes, total_bytes // 2)
    for group in _groups(root, "memory"):
        for limit_file, used_file, cache_field in _MEMORY_FILES:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                cache = _fields(group / "memory.stat").get(cache_field, 0)
                yield MemoryLimit(limit, max(0, limit - max(0, used - cache)))


def _cpu_quota(group: Path) -> int | None:
    """In whole cores, the last one begun; None if the group has no limit."""
    values = _text(group / "cpu.max").split() or (
        _text(group / "cpu.cfs_quota_us"),
        _text(group / "cpu.cfs_period_us"),
    )
    try:
        quota, period = (int(value) for value in values)
    except ValueError:  # "max", or there are no such files
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, as `controller` counts; inmost first."""
    tree = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controller in controllers.split(","):
            mounts = [tree / controller]
        elif line.startswith("0::"):
            mounts = [tree, tree / "unified"]  # the second beside version 1
        else:
            continue
        parts = [part for part in name.split("/") if part]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth])


def _fields(path: Path) -> dict[str, int]:
    """Numbers by their names: `MemTotal: 17 kB` and `inactive_file 17` alike."""
    lines = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """Empty if there is no such file, or it may not be read: a group without it sets no limit."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
