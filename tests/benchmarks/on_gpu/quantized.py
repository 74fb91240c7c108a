"""Each `--quantize` kind on the device: how far its products are off, what they cost beside bfloat16,
whether they can be captured; and a model of each kind."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.benchmarks.on_gpu.bench import Bench, Rows, Unanswered, Wrong
from tests.benchmarks.on_gpu.families import IDS, Oracle
from tests.benchmarks.on_gpu.greedy import Answer, Greedy
from tests.checkpoints import random_prompt
from worker.quantization.registry import QUANTIZATIONS, linear_backends

# Of a product with normal weights: the root mean square of the error, as a share of the result.
MOST_ERROR = {
    "bitsandbytes": 0.02,
    "bitsandbytes-nf4": 0.12,
    "bitsandbytes-fp4": 0.16,
    "int8": 0.02,
}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 8, 64)


def quantized_products(bench: Bench) -> Rows:
    """Errors are shares of the result; times are of launched and of captured calls, beside bfloat16's
    captured ones. Is any kind off by more than it may be?"""
    found: Rows = []
    bad = []
    for kind, backend in _backends().items():
        for num_outputs, num_inputs in ((128, 64),) if bench.is_small else SHAPES:
            weight = bench.randn(num_outputs, num_inputs)
            product = backend(weight.clone(), None)
            for num_rows in ROWS:
                x = bench.randn(num_rows, num_inputs)
                exact = F.linear(x.float(), weight.float())
                error = (product(x).float() - exact).norm() / exact.norm()
                name = f"{num_outputs} x {num_inputs}"
                row = {"kind": kind, "shape": name, "M": num_rows, "error": float(error)}
                found.append(row | _times(bench, product, weight, x))
                if not error < MOST_ERROR[kind]:
                    bad.append(f"{kind}, {name}, M = {num_rows}")
    if bad:
        raise Wrong(f"too far off: {'; '.join(bad)}", found)
    _note_missing(found)
    return found


def quantized_models(bench: Bench) -> Rows:
    """A llama and a BLOOM of two layers with each kind: memory, and how the log-probabilities of a
    first token correlate with bfloat16's. Is it still the same model?"""
    import transformers as hf

    hidden = bench.size(512, 128)
    prompts = [random_prompt(length, seed=length) for length in (5, 23, 37, 12)]
    llama = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2)
    shapes = {
        "llama": hf.LlamaConfig(**IDS | llama, num_attention_heads=8, num_key_value_heads=2),
        "bloom": hf.BloomConfig(**IDS, hidden_size=hidden, n_layer=2, n_head=8),
    }
    found: Rows = []
    for name, config in shapes.items():
        with tempfile.TemporaryDirectory(prefix="tokenfleet-gpu-") as folder:
            Oracle(Path(folder), config, bench.device)
            plain = Greedy(Path(folder), bench.device, torch.bfloat16).answer(prompts, 1)
            for kind in _backends():
                before = _allocated(bench)
                model = Greedy(Path(folder), bench.device, torch.bfloat16, quantize=kind)
                num_bytes = _allocated(bench) - before
                agreement = _agreement(model.answer(prompts, 1), plain)
                row = {"model": name, "kind": kind, "MiB with cache": num_bytes / 2**20}
                found.append(row | {"correlation": agreement})
                del model
    bad = [f"{row['model']}, {row['kind']}" for row in found if not row["correlation"] > 0.5]
    if bad:
        raise Wrong(f"no longer the same model: {'; '.join(bad)}", found)
    _note_missing(found)
    return found


def _backends() -> dict[str, Callable[..., Callable[[torch.Tensor], torch.Tensor]]]:
    """Those that can run here, by kind."""
    backends = {}
    for kind in QUANTIZATIONS:
        try:
            backends[kind] = linear_backends(kind)[0]
        except ValueError:  # the package is missing
            continue
    return backends


def _note_missing(found: Rows) -> None:
    """Raises Unanswered for the kinds that could not be asked about, with what was found."""
    missing = [kind for kind in QUANTIZATIONS if all(row["kind"] != kind for row in found)]
    if missing:
        raise Unanswered(f"not installed: what {', '.join(missing)} need", found)


def _times(
    bench: Bench,
    product: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    x: torch.Tensor,
) -> dict[str, object]:
    plain_us = bench.time_us(bench.captured(lambda: F.linear(x, weight)))
    launched_us = bench.time_us(lambda: product(x))
    try:
        captured: object = bench.time_us(bench.captured(lambda: product(x)))
    except RuntimeError as error:
        captured = f"refused: {str(error).splitlines()[0][:60]}"
    times = {"us": launched_us, "us captured": captured, "us bfloat16": plain_us}
    best = captured if isinstance(captured, float) else launched_us
    return times | {"times as fast": plain_us / best}


def _agreement(found: list[Answer], expected: list[Answer]) -> float:
    """Correlation of log-probabilities, the mean over prompts."""
    pairs = zip(found, expected, strict=True)
    both = [torch.corrcoef(torch.stack((ours.first, theirs.first)))[0, 1] for ours, theirs in pairs]
    return float(torch.stack(both).mean())


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated() if bench.is_cuda else 0
