"""The benchmark of loading: its checkpoints can be loaded, and its numbers are what they say."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.loading import Round, plain_reading_s, shortcomings, table
from tests.benchmarks.memory_peak import MemoryPeak, MemoryWatch, cpu_seconds, total_bytes
from tests.benchmarks.random_checkpoint import LlamaShape, write_checkpoint
from worker.engine.engine import build_engine
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder

GIB = 2**30


def test_random_checkpoint_is_one_of_several_files_that_loads(tmp_path: Path) -> None:
    shape = LlamaShape(64, 96, num_heads=4, num_kv_heads=2, vocab_size=199)
    num_bytes = write_checkpoint(tmp_path, 200_000, shape, file_bytes=90_000)
    assert 200_000 <= num_bytes < 280_000
    files = ModelFolder(tmp_path).weight_files()
    assert len(files) > 2
    assert num_bytes < sum(file.stat().st_size for file in files) < num_bytes + 20_000
    assert plain_reading_s(files) > 0
    settings = WorkerSettings(model_id=str(tmp_path), device="cpu", dtype="bfloat16", threads=1)
    loaded = build_engine(settings)
    assert loaded.architecture == "LlamaForCausalLM"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, as the benchmark does")
def test_fresh_memory_is_written_to() -> None:
    code = (
        "import re; from tests.benchmarks.fresh_memory import fresh_memory_s\n"
        "peak = lambda: int(re.search('VmHWM:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); assert fresh_memory_s(64 * 2**20, 2) > 0; print(peak() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 * 1024 < int(told.stdout) < 80 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, as the benchmark does")
def test_memory_of_children_counts_and_that_of_the_file_cache_does_not(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * 2**20))
    code = (
        "import os, sys, subprocess; data = b'x' * (48 * 2**20); open(sys.argv[1], 'rb').read(1);"
        "f = open(sys.argv[1], 'rb', buffering=0); b = bytearray(4096);\n"
        "while f.readinto(b): pass\n"
        "print('here', flush=True); sys.stdin.read()"
    )
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        with MemoryWatch(process.pid) as watch:
            assert process.stdout.readline() == b"here\n"
        assert 48 * 2**20 < watch.peak.pss < watch.peak.rss < 110 * 2**20
        assert cpu_seconds(process.pid) > 0
        process.stdin.close()
    assert total_bytes() == pytest.approx(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE, rel=0.01)


def test_limits_are_on_the_median_of_cold_rounds_and_on_the_highest_peak() -> None:
    def a_round(is_cold: bool, load_s: float, rss: int = 5 * GIB) -> Round:
        return Round(is_cold, 4.0, 1.0, load_s, 2.0, MemoryPeak(4 * GIB, rss, 0))

    good = [a_round(True, 1.2), a_round(True, 9.0), a_round(True, 1.3), a_round(False, 20.0)]
    assert shortcomings(good, 10 * GIB) == []
    assert "| cold | 0.54 | 2.15 | 1.65 | 77% | 0.93 | 4.00 GiB, 40.0% |" in table(
        good, 2 * GIB, 10 * GIB
    )
    slow = [a_round(True, 1.5), a_round(True, 1.6, rss=7 * GIB)]
    speed, memory = shortcomings(slow, 10 * GIB)
    assert speed == "missed: 65% of plain reading, not 70%"
    assert memory == "missed: 70.0% of memory at the peak, not 60%"
