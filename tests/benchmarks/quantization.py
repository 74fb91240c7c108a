"""What each `--quantize` costs: memory of the weights, decode speed, perplexity. Prints a table and
one JSON line.

    python -m tests.benchmarks.quantization --model-id .models/SmolLM2-135M-Instruct

All kinds are loaded side by side and take turns, a few decode steps each, so that whatever else the
machine does hits all alike. A step's time is the 20th percentile of its repetitions, and its CPU
time (of all threads) the same; the second is what to compare on a machine that others use. The
perplexity is that of `tests/data/english.txt`, in windows of 512 tokens.
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from common.messages import Sampling
from tests.benchmarks.machine import machine
from tests.tensors import tensor_bytes
from worker.engine.engine import build_engine
from worker.engine.loaded import LoadedModel
from worker.engine.plan import Chunk, SequenceStart, StepPlan
from worker.layers.build import Build
from worker.models.registry import model_class
from worker.quantization.registry import QUANTIZATIONS, linear_backends
from worker.settings import WorkerSettings
from worker.weights.loader import load_weights
from worker.weights.prepare import prepare_model

TEXT = Path(__file__).parents[1] / "data" / "english.txt"
WINDOW = 512  # tokens that one prediction may look back on, at most
CONTEXT = 64  # tokens before the first measured step
STEPS = 8  # of one turn
PLAIN = "bfloat16"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one kind costs; times are of one decode step, by the number of sequences in it."""

    kind: str
    weight_bytes: int
    perplexity: float
    step_ms: dict[int, float]
    step_cpu_ms: dict[int, float]


class Decoding:
    """Sequences that decode together, one token a step each."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._engine = loaded.engine
        per_sequence = loaded.max_total_tokens // loaded.layout.block_size
        self._step = 0
        self._position = len(prompts[0])
        self._slots = range(len(prompts))
        for slot, prompt in enumerate(prompts):
            blocks = tuple(range(slot * per_sequence, (slot + 1) * per_sequence))
            start = SequenceStart(slot, tuple(prompt), (), Sampling())
            self._run((Chunk(slot, 0, tuple(prompt), blocks, False),), (start,))
        self._tokens = [prompt[-1] for prompt in prompts]

    def time_step(self) -> tuple[float, float]:
        """Seconds of one step: of the clock, and of the CPU."""
        chunks = tuple(
            Chunk(slot, self._position, (token,), (), True)
            for slot, token in zip(self._slots, self._tokens, strict=True)
        )
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        result = self._run(chunks)
        times = time.perf_counter() - started_at, time.process_time() - cpu_started_at
        self._tokens = [sampled.token for sampled in result.sampled]
        self._position += 1
        return times

    def close(self) -> None:
        """Free the slots for others."""
        self._engine.step(StepPlan(self._step, (), released=tuple(self._slots)))

    def _run(self, chunks: tuple[Chunk, ...], started: tuple[SequenceStart, ...] = ()) -> object:
        self._step += 1
        return self._engine.step(StepPlan(self._step, chunks, started))


def perplexity(loaded: LoadedModel, tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of `tokens`, cut into windows."""
    logprobs: list[float] = []
    blocks = tuple(range(-(-WINDOW // loaded.layout.block_size)))
    for step, start in enumerate(range(0, len(tokens), WINDOW)):
        window = tuple(tokens[start : start + WINDOW])
        sequence = SequenceStart(0, window, (), Sampling(), prompt_logprobs=True)
        chunk = Chunk(0, 0, window, blocks, False)
        result = loaded.engine.step(StepPlan(2 * step, (chunk,), (sequence,)))
        logprobs += [value for scored in result.prompt_logprobs for value in scored.logprobs]
        loaded.engine.step(StepPlan(2 * step + 1, (), released=(0,)))
    return math.exp(-sum(logprobs) / len(logprobs))


def weight_bytes(model_id: str, kind: str | None) -> int:
    """Memory of the loaded weights alone."""
    folder = prepare_model(model_id, revision=None, cache_dir=None)
    family = model_class(folder.config()["architectures"])
    config = family.read_config(folder.config())
    linear, head = linear_backends(kind)
    before = tensor_bytes()
    model = family(config, Build(torch.bfloat16, linear_backend=linear, head_backend=head))
    load_weights(model, family.weight_names(config), folder.weight_files(), torch.device("cpu"))
    return tensor_bytes() - before


def measure(model_id: str, *, threads: int, rows: Sequence[int], rounds: int) -> list[Cost]:
    """Load all kinds, then let them take turns."""
    kinds = {PLAIN: None} | {kind: kind for kind in QUANTIZATIONS}
    sizes = {name: weight_bytes(model_id, kind) for name, kind in kinds.items()}
    gc.collect()
    total = max(WINDOW, 2 * CONTEXT + STEPS * rounds)
    loaded = {
        name: build_engine(
            WorkerSettings(
                model_id=model_id,
                quantize=kind,
                device="cpu",
                dtype="bfloat16",
                threads=threads,
                max_total_tokens=-(-total // 32) * 32,
                max_batch_size=max(rows),
                max_batch_total_tokens=max(rows) * -(-total // 32) * 32,
            )
        )
        for name, kind in kinds.items()
    }
    tokens = Tokenizer.from_str(loaded[PLAIN].tokenizer_json).encode(TEXT.read_text()).ids
    step_s = {name: {} for name in kinds}
    step_cpu_s = {name: {} for name in kinds}
    for num_rows in rows:
        prompts = [tokens[row * 20 : row * 20 + CONTEXT] for row in range(num_rows)]
        decodings = {name: Decoding(model, prompts) for name, model in loaded.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, decoding in decodings.items():
                decoding.time_step()  # its weights are not in the caches
                times[name] += [decoding.time_step() for _ in range(STEPS - 1)]
        for name, decoding in decodings.items():
            decoding.close()
            wall, cpu = (sorted(values) for values in zip(*times[name], strict=True))
            step_s[name][num_rows] = wall[len(wall) // 5]
            step_cpu_s[name][num_rows] = cpu[len(cpu) // 5]
    return [
        Cost(
            name,
            sizes[name],
            perplexity(loaded[name], tokens),
            {num_rows: 1000 * seconds for num_rows, seconds in step_s[name].items()},
            {num_rows: 1000 * seconds for num_rows, seconds in step_cpu_s[name].items()},
        )
        for name in kinds
    ]


def table(costs: Sequence[Cost]) -> str:
    """Markdown; speeds are tokens per second of all sequences, and how many times bfloat16's."""
    rows = list(costs[0].step_ms)
    head = ["`--quantize`", "weights", *(f"{n} rows" for n in rows), "perplexity"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for cost in costs:
        speeds = [
            f"{1000 * n / cost.step_ms[n]:.0f} tok/s, {costs[0].step_ms[n] / cost.step_ms[n]:.2f}x "
            f"(CPU {costs[0].step_cpu_ms[n] / cost.step_cpu_ms[n]:.2f}x)"
            for n in rows
        ]
        size = (
            f"{cost.weight_bytes / 2**20:.0f} MiB, {cost.weight_bytes / costs[0].weight_bytes:.2f}x"
        )
        change = f"{100 * (cost.perplexity / costs[0].perplexity - 1):+.1f} %"
        lines.append(" | ".join([cost.kind, size, *speeds, f"{cost.perplexity:.2f}, {change}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    where = machine()
    print(f"{where.line}; {options.threads} threads", flush=True)
    costs = measure(
        options.model_id, threads=options.threads, rows=options.rows, rounds=options.rounds
    )
    print(table(costs))
    print(json.dumps({"machine": where.facts, "costs": [asdict(cost) for cost in costs]}))


if __name__ == "__main__":
    main()
