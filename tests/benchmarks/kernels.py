"""Our CPU kernels beside the torch operations that they stand for.

    python -m tests.benchmarks.kernels

Shapes of SmolLM2-135M in bfloat16. Every pair is timed in turns, so that a busy moment meets both;
weights and caches are as many as a model has layers, so that they come from memory as in a step.
The ratio is the median of the turns' ratios.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch
import torch.nn.functional as F

from common.messages import Sampling
from tests.benchmarks.machine import machine
from tests.benchmarks.report import aligned, plain
from worker.kernels.cpu.choices import greedy_choice
from worker.kernels.cpu.library import cpu_kernels
from worker.kernels.cpu.products import packed_product
from worker.layers.linear import PACK_ROWS_HINT
from worker.sampling.choice import Chooser, draw_by_kernel
from worker.sampling.noise import row_keys

LAYERS = 30
HIDDEN, HEADS, KV_HEADS, DIM, VOCAB = 576, 9, 3, 64, 49_152
PRODUCTS = {
    "qkv": (960, HIDDEN, LAYERS),
    "output": (HIDDEN, HIDDEN, LAYERS),
    "gate, up": (3072, HIDDEN, LAYERS),
    "down": (HIDDEN, 1536, LAYERS),
    "head": (VOCAB, HIDDEN, 1),
}
RULES = {
    "draw": Sampling(do_sample=True, temperature=0.8),
    "draw, top_p": Sampling(do_sample=True, temperature=0.8, top_p=0.95),
    "draw, top_k": Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.95),
    "draw, typical": Sampling(do_sample=True, temperature=0.8, typical_p=0.95),
}
BLOCK = 32
# Until the threads of the other side have gone to sleep: OpenMP's spin for some milliseconds.
PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Timing:
    """One operation on so many rows, microseconds."""

    name: str
    rows: int
    torch_us: float
    ours_us: float
    ratio: float


Operation = Callable[[int], object]  # on the layer of this number


@click.command(context_settings={"show_default": True})
@click.option("--threads", default=2)
@click.option(
    "--rows", "row_counts", default="1,8,32,128,1024", help="Numbers of rows, with commas."
)
@click.option("--context", default=160, help="Tokens that attention looks at.")
@click.option("--turns", default=15)
@torch.inference_mode()
def main(threads: int, row_counts: str, context: int, turns: int) -> None:
    """Time kernels and torch's operations in turns; print a table, then one line of JSON."""
    host = machine()
    click.echo(f"{host.line}; {threads} threads\n")
    torch.set_num_threads(threads)
    timings = []
    for rows in map(int, row_counts.split(",")):
        products = PRODUCTS if rows <= 128 else {}
        for name, (num_outputs, num_inputs, layers) in products.items():
            pair = _products(rows, num_outputs, num_inputs, layers)
            timings.append(_compare(name, rows, *pair, layers=layers, turns=turns))
        if rows > 1:
            timings.append(_compare("prompt", rows, *_prompts(rows), layers=LAYERS, turns=turns))
        timings.append(_compare("norm", rows, *_norms(rows), layers=LAYERS, turns=turns))
        if rows <= 64:
            pair = _attention(rows, context)
            timings.append(_compare("attention", rows, *pair, layers=LAYERS, turns=turns))
            timings.append(_compare("greedy", rows, *_greedy(rows), layers=1, turns=turns))
            for name, rule in RULES.items():
                pair = _draws(rows, rule)
                timings.append(_compare(name, rows, *pair, layers=1, turns=turns))
    cells = [
        [t.name, str(t.rows), f"{t.torch_us:.0f}", f"{t.ours_us:.0f}", f"{t.ratio:.2f}x"]
        for t in timings
    ]
    head = ["operation", "rows", "torch µs", "ours µs", "torch / ours"]
    click.echo("\n".join(aligned([head, *cells])))
    facts = {"benchmark": "kernels", "machine": host.facts, "threads": threads, "context": context}
    click.echo(json.dumps(plain(facts | {"timings": [asdict(timing) for timing in timings]})))


def _compare(
    name: str, rows: int, theirs: Operation, ours: Operation, *, layers: int, turns: int
) -> Timing:
    times = [(_seconds(theirs, layers), _seconds(ours, layers)) for _ in range(turns + 1)][1:]
    return Timing(
        name,
        rows,
        torch_us=statistics.median(time for time, _ in times) * 1e6,
        ours_us=statistics.median(time for _, time in times) * 1e6,
        ratio=statistics.median(torch_s / ours_s for torch_s, ours_s in times),
    )


def _seconds(operation: Operation, layers: int) -> float:
    time.sleep(PAUSE_S)
    operation(0)
    start = time.perf_counter()
    for layer in range(layers):
        operation(layer)
    return (time.perf_counter() - start) / layers


def _products(
    rows: int, num_outputs: int, num_inputs: int, layers: int
) -> tuple[Operation, Operation]:
    """oneDNN's prepacked product, and ours."""
    x = torch.randn(rows, num_inputs).bfloat16()
    weights = [torch.randn(num_outputs, num_inputs).bfloat16() for _ in range(layers)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, PACK_ROWS_HINT) for w in weights]
    ours = [packed_product(weight, None) for weight in weights]
    if None in ours:
        raise click.ClickException("this processor's products are left to oneDNN")
    product = torch.ops.mkldnn._linear_pointwise.default
    return (
        lambda layer: product(x, packed[layer], None, "none", [], ""),
        lambda layer: ours[layer](x),
    )


def _norms(rows: int) -> tuple[Operation, Operation]:
    x, weight = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    kernels = _kernels()
    return (
        lambda layer: F.rms_norm(x.float(), (HIDDEN,), None, 1e-5).bfloat16().mul_(weight),
        lambda layer: kernels.rms_norm(x, weight, 1e-5),
    )


def _attention(rows: int, context: int) -> tuple[Operation, Operation]:
    """A gather and scaled dot product attention, and ours; sequences of one length."""
    kernels = _kernels()
    per_row = -(-context // BLOCK)
    num_blocks = rows * per_row
    cache = [torch.randn(num_blocks, BLOCK, 2 * KV_HEADS, DIM).bfloat16() for _ in range(LAYERS)]
    blocks, keep, scale = torch.randperm(num_blocks), slice(0, context), DIM**-0.5
    q = torch.randn(rows, HEADS, DIM).bfloat16()
    queries = q.view(rows, KV_HEADS, -1, DIM)
    out = torch.empty(rows, HEADS * DIM, dtype=torch.bfloat16)

    def theirs(layer: int) -> torch.Tensor:
        tokens = cache[layer].index_select(0, blocks).view(rows, -1, 2 * KV_HEADS, DIM)[:, keep]
        keys, values = tokens.transpose(1, 2).split(KV_HEADS, dim=1)
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)

    return (
        theirs,
        lambda layer: kernels.paged_decode(out, q, cache[layer], blocks, keep, None, scale),
    )


def _prompts(rows: int) -> tuple[Operation, Operation]:
    """Causal attention of one prompt, without earlier tokens."""
    kernels, scale = _kernels(), DIM**-0.5
    q = torch.randn(rows, HEADS, DIM).bfloat16()
    kv = torch.randn(rows, 2 * KV_HEADS, DIM).bfloat16()
    shared = kv.transpose(0, 1)[None].expand(HEADS // KV_HEADS, -1, -1, -1)
    queries = q.view(rows, KV_HEADS, -1, DIM).permute(2, 1, 0, 3)
    keys, values = shared[:, :KV_HEADS], shared[:, KV_HEADS:]
    out = torch.empty(rows, HEADS * DIM, dtype=torch.bfloat16)
    return (
        lambda layer: F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale
        ),
        lambda layer: kernels.prompt_attention(out, q, kv, None, rows, None, scale),
    )


def _greedy(rows: int) -> tuple[Operation, Operation]:
    logits = torch.randn(rows, VOCAB)
    return (
        lambda layer: (logits.argmax(dim=-1), logits.logsumexp(dim=-1)),
        lambda layer: greedy_choice(logits),
    )


def _draws(rows: int, rule: Sampling) -> tuple[Operation, Operation]:
    """Random choices; a language model's logits are about as uneven."""
    logits = torch.randn(rows, VOCAB) * 3
    numbers, rules = list(range(rows)), [rule] * rows
    keys = row_keys(numbers, numbers, torch.device("cpu"))
    chooser = Chooser(VOCAB, torch.device("cpu"))
    return (
        lambda layer: chooser.draw_by_torch(logits, numbers, rules, keys),
        lambda layer: draw_by_kernel(logits, numbers, rules, keys),
    )


def _kernels():
    kernels = cpu_kernels(torch.device("cpu"), torch.bfloat16)
    if kernels is None:
        raise click.ClickException("no kernels were built for this processor")
    return kernels


if __name__ == "__main__":
    main()
