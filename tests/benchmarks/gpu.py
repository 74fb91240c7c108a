"""Asks one GPU what `make test` cannot know, in less than ten minutes: is every family exact there, is
each kind of quantization right, and how fast are the parts that a faster engine would be made of?

    python tests/benchmarks/gpu.py                                  # the first CUDA device
    python tests/benchmarks/gpu.py --device cpu --small             # every line of it, on anything

It runs from a bare checkout: torch and transformers are enough, and Triton for one question. Each
question has a process of its own, so that one that fails, hangs or breaks the device is reported by
its name and the others are asked. Prints Markdown, then one line of JSON; exits with 1 when anything
was wrong or failed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # and not this folder, whose names are common ones

import torch

from tests.benchmarks.machine import machine
from tests.benchmarks.on_gpu import (
    decode_attention,
    families,
    matmuls,
    quantized,
    step_graph,
    two_ranks,
)
from tests.benchmarks.on_gpu.bench import (
    Bench,
    Finding,
    Outcome,
    Question,
    finding_of,
    table,
)

MOST_S = 570.0  # for all questions
QUESTIONS = (
    Question("parity", "families", families.parity, limit_s=120),
    Question("quantized-models", "--quantize", quantized.quantized_models),
    Question("bandwidth", "1", matmuls.bandwidth),
    Question("triton-attention", "2", decode_attention.triton_attention, limit_s=120),
    Question("engine-attention", "2", decode_attention.engine_attention),
    Question("flash-operator", "3", decode_attention.flash_operator),
    Question("step-graph", "4", step_graph.step_graph, limit_s=120),
    Question("row-independence", "5", matmuls.row_independence),
    Question("quantized-products", "6", quantized.quantized_products, limit_s=90),
    Question("two-ranks", "7", two_ranks.two_ranks, limit_s=90),
    Question("nccl-capture", "7", two_ranks.nccl_capture),
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a quick look")
    names = [question.name for question in QUESTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="QUESTION")
    parser.add_argument("--answer", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        print(json.dumps(answer(options.answer, options.device, is_small=options.small).facts))
        return
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"torch finds no {options.device}; --device cpu --small tries the script")
    host = machine()
    print(f"{host.line}\n", flush=True)
    findings = []
    give_up_at = time.monotonic() + MOST_S
    for question in QUESTIONS:
        if question.name in options.only:
            left_s = max(1.0, give_up_at - time.monotonic())
            finding = ask(question, options.device, is_small=options.small, most_s=left_s)
            print(section(question, finding), flush=True)
            findings.append(finding)
    facts = {"device": options.device, "findings": [finding.facts for finding in findings]}
    print(json.dumps({"benchmark": "gpu", "machine": host.facts} | facts))
    sys.exit(int(any(finding.is_failure for finding in findings)))


def ask(question: Question, device: str, *, is_small: bool, most_s: float) -> Finding:
    """Let a process of its own answer; whatever becomes of it is a finding."""
    command = [sys.executable, str(Path(__file__).resolve()), "--answer", question.name]
    command += ["--device", device, *(["--small"] if is_small else [])]
    limit_s = min(question.limit_s, most_s)
    started_at = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(question.name, Outcome.FAILED, f"no answer in {limit_s:.0f} s", (), limit_s)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        took_s = time.monotonic() - started_at
        return Finding(question.name, Outcome.FAILED, reason[:300], (), took_s)
    return Finding.of(json.loads(lines[-1]))


def answer(name: str, device: str, *, is_small: bool) -> Finding:
    """Ask in this process."""
    question = next(question for question in QUESTIONS if question.name == name)
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        device = device if ":" in device else f"{device}:0"
        torch.cuda.set_device(device)
    return finding_of(question, Bench(torch.device(device), is_small=is_small))


def section(question: Question, finding: Finding) -> str:
    """Markdown."""
    about = " ".join((question.ask.__doc__ or "").split())
    lines = [f"### {question.name} ({question.number}): {finding.outcome}, {finding.took_s:.1f} s"]
    lines += ["", about, ""]
    lines += [finding.reason, ""] if finding.reason else []
    lines += [table(finding.rows), ""] if finding.rows else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
