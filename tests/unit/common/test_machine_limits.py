"""Memory and cores that control groups leave, in trees of files as kernels and containers show
them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.machine_limits import (
    available_memory_bytes,
    has_spare_memory,
    num_usable_cores,
)

MEMINFO = (
    "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   6000 kB\nHugePages: 0\n"
)
FREE = 6000 * 1024
MAKE = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MAKE:
    """Makes the root of a file system with 8 cores; files of groups are named as below
    /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def make(own_groups: str | None = None, files: dict[str, object] | None = None) -> Path:
        contents = {"proc/meminfo": MEMINFO}
        if own_groups is not None:
            contents["proc/self/cgroup"] = own_groups
        contents |= {f"sys/fs/cgroup/{name}": text for name, text in (files or {}).items()}
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


def v2_memory(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon 7\ninactive_file {cache}\nactive_file 3"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    return {f"{folder}{name}": value for name, value in files.items()}


def v1_memory(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    values = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{folder}memory.{name}": value for name, value in values.items()}


def test_without_control_groups(machine: MAKE) -> None:
    root = machine()
    assert available_memory_bytes(root) == FREE
    assert has_spare_memory(root) and num_usable_cores(root) == 8


def test_limit_of_the_own_group(machine: MAKE) -> None:
    files = v2_memory("user/job/", 5_000_000, 3_000_000) | {"user/job/cpu.max": "300000 100000"}
    root = machine("0::/user/job", files)
    assert available_memory_bytes(root) == 2_000_000
    assert num_usable_cores(root) == 3


def test_least_limit_of_the_groups_above(machine: MAKE) -> None:
    files = v2_memory("user/job/", 5_000_000, 10) | v2_memory("user/", 1_000_000, 400_000)
    files |= {"user/job/cpu.max": "max 100000", "user/cpu.max": "150000 100000"}
    root = machine("0::/user/job", files)
    assert available_memory_bytes(root) == 600_000
    assert num_usable_cores(root) == 2, "one and a half"


def test_file_cache_that_nobody_reads_is_not_in_use(machine: MAKE) -> None:
    root = machine("0::/", v2_memory("", 5_000_000, 4_900_000, cache=4_000_000))
    assert available_memory_bytes(root) == 4_100_000


def test_container_sees_its_group_as_the_root(machine: MAKE) -> None:
    files = v2_memory("", 1_000_000, 100) | {"cpu.max": "50000 100000"}
    root = machine("0::/", files)
    assert available_memory_bytes(root) == 999_900
    assert num_usable_cores(root) == 1


def test_version_1(machine: MAKE) -> None:
    files = v1_memory("memory/docker/a/", 3_000_000, 2_500_000, cache=1_000_000)
    files |= v1_memory("memory/docker/", 2**63 - 4096, 2_500_000)
    files |= {"cpu/docker/a/cpu.cfs_quota_us": 250_000, "cpu/docker/a/cpu.cfs_period_us": 100_000}
    files |= {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100_000}
    own = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a"
    root = machine(own, files)
    assert available_memory_bytes(root) == 1_500_000
    assert num_usable_cores(root) == 3


def test_container_of_version_1_that_is_named_by_its_place_on_the_host(machine: MAKE) -> None:
    files = v1_memory("memory/", 3_000_000, 500_000)
    files |= {"cpu/cpu.cfs_quota_us": 200_000, "cpu/cpu.cfs_period_us": 100_000}
    root = machine("5:memory:/docker/abc\n4:cpu:/docker/abc", files)
    assert available_memory_bytes(root) == 2_500_000
    assert num_usable_cores(root) == 2


def test_both_versions(machine: MAKE) -> None:
    files = v1_memory("memory/a/", 3_000_000, 500_000) | v2_memory("unified/b/", 4_000_000, 0)
    root = machine("5:memory:/a\n0::/b", files)
    assert available_memory_bytes(root) == 2_500_000
    files = v1_memory("memory/a/", 5_000_000, 500_000)
    assert available_memory_bytes(machine("5:memory:/a\n0::/b", files)) == 4_000_000


def test_no_limit_and_garbage_are_no_limits(machine: MAKE) -> None:
    files = v2_memory("", "max", 10**12) | {"cpu.max": "max 100000"}
    files |= v2_memory("odd/", "?", 3) | {"odd/cpu.max": "0 0", "memory/memory.max": 7}
    root = machine("0::/odd\nnonsense\n:::\n7:memory", files)
    assert available_memory_bytes(root) == FREE
    assert num_usable_cores(root) == 8


def test_group_above_the_visible_root(machine: MAKE) -> None:
    root = machine("0::/../other", v2_memory("", 1_000_000, 100))
    assert available_memory_bytes(root) == 999_900


def test_more_in_use_than_the_limit(machine: MAKE) -> None:
    root = machine("0::/", v2_memory("", 1000, 2000, cache=10))
    assert available_memory_bytes(root) == 0 and not has_spare_memory(root)


def test_cores_that_others_keep(machine: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert num_usable_cores(machine("0::/", {"cpu.max": "400000 100000"})) == 2


@pytest.mark.parametrize(("used", "is_spare"), [(899_000, True), (901_000, False)])
def test_a_tenth_is_kept_free(machine: MAKE, used: int, is_spare: bool) -> None:
    assert has_spare_memory(machine("0::/", v2_memory("", 1_000_000, used))) is is_spare


def test_this_machine() -> None:
    assert available_memory_bytes() > 0 and 1 <= num_usable_cores() <= (os.cpu_count() or 1)
