"""Before transformers serves a model through one of our paths: does the path compute what the model
computes by itself? Without this, a path that misses something answers fluently and wrongly.

Every check runs a few random tokens, in the type and on the device that will serve, and compares
logits.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, islice, pairwise

import torch

from worker.engine.batch import BlockTables
from worker.engine.memory import KvShape, allocate_kv_cache
from worker.engine.padded_runner import PaddedRunner
from worker.engine.paged_runner import PagedModel, PagedRunner
from worker.engine.plan import Chunk, KvCacheLayout
from worker.layers.build import Build
from worker.models.auto import AutoFacts, UnsupportedModelError, model_errors

BLOCK_SIZE = 4
# The chunks in which each of two sequences comes, a column a step: two prompts side by side, a
# piece of a prompt beside a single token, then single tokens.
PIECES = ((14, 3, 1, 1, 1), (9, 1, 1, 1, 1))
NUM_SINGLE = 3
# As a share of the logits' spread. In SmolLM2-135M, rounding gives 5e-6 in float32 and 0.05 in
# bfloat16; one wrong layer of its thirty gives 0.3 to 0.4, a scale that is off by 0.7 in all 0.5.
MAX_ERROR = {torch.float32: 1e-3}
MAX_ERROR_ROUNDED = 0.2

Rows = tuple[torch.Tensor, torch.Tensor]  # found and expected logits, [n, V] both


def check_tokens(vocab_size: int) -> tuple[list[int], ...]:
    """Two prompts, the same at every start."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(vocab_size, (sum(pieces),), generator=generator).tolist() for pieces in PIECES
    )


@torch.inference_mode()
def check_paged(
    model: PagedModel,
    prompts: Sequence[Sequence[int]],
    facts: AutoFacts,
    build: Build,
    expected: Sequence[torch.Tensor],
) -> None:
    """Run both prompts, packed and in pieces, on a small paged cache.

    Args:
        prompts: of `check_tokens`.
        expected: logits `[n, V]` of each prompt, from the model as it was.

    Raises:
        UnsupportedModelError: the logits differ clearly.
    """
    layout = KvCacheLayout(num_blocks=16, block_size=BLOCK_SIZE, num_slots=len(prompts))
    shape = KvShape(facts.num_layers, facts.num_kv_heads, facts.head_dim, build.dtype)
    tables = BlockTables(
        layout,
        max_total_tokens=max(map(len, prompts)),
        windows=facts.windows,
        dtype=build.dtype,
        device=build.device,
        token_bytes=shape.token_bytes,
        limits=None,
    )
    runner = PagedRunner(model, allocate_kv_cache(layout, shape, build.device))
    prompt_rows: list[Rows] = []
    later_rows: list[Rows] = []
    for chunks in _steps(prompts):
        batch = tables.batch(chunks)
        with model_errors("on the paged cache"):
            logits = model.logits(runner.hidden(batch))
        for chunk, row in zip(chunks, batch.first_rows, strict=True):
            size = len(chunk.tokens)
            wanted = expected[chunk.slot][chunk.start : chunk.start + size]
            rows = later_rows if chunk.start else prompt_rows
            rows.append((logits[row : row + size], wanted))
    _compare(prompt_rows, build.dtype, "on the paged cache")
    _compare(later_rows, build.dtype, "on the paged cache, in later steps,")


def _steps(prompts: Sequence[Sequence[int]]) -> Iterator[list[Chunk]]:
    """The prompts as `PIECES` cuts them, in new blocks."""
    blocks = count()
    bounds = [list(pairwise(accumulate(pieces, initial=0))) for pieces in PIECES]
    for step in zip(*bounds, strict=True):
        chunks = []
        for slot, (start, stop) in enumerate(step):
            num_new = -(-stop // BLOCK_SIZE) - -(-start // BLOCK_SIZE)
            tokens = tuple(prompts[slot][start:stop])
            chunks.append(Chunk(slot, start, tokens, tuple(islice(blocks, num_new)), False))
        yield chunks


@torch.inference_mode()
def check_cached(
    runner: PaddedRunner,
    prompt: Sequence[int],
    encoder_tokens: Sequence[int],
    dtype: torch.dtype,
) -> int:
    """Run a prompt as a whole, and then its last tokens one by one with the model's own cache.

    Returns the width of the logits. Raises UnsupportedModelError if they differ clearly.
    """
    with model_errors("without a cache"):
        expected = runner.whole_logits(prompt, encoder_tokens)
    runner.start(0, encoder_tokens)
    pieces = (len(prompt) - NUM_SINGLE, *[1] * NUM_SINGLE)
    rows: list[Rows] = []
    for first, stop in pairwise(accumulate(pieces, initial=0)):
        with model_errors("token by token"):
            found = runner.run(0, prompt[first:stop], num_logits=stop - first)
        rows.append((found, expected[first:stop]))
    _compare(rows[:1], dtype, "with a cache")
    _compare(rows[1:], dtype, "token by token")
    runner.release(0)
    return expected.shape[-1]


@torch.inference_mode()
def check_batched(
    runner: PaddedRunner, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> None:
    """Run the last tokens of prompts of different lengths together.

    Raises UnsupportedModelError if that cannot be, or if the logits differ clearly.
    """
    slots = range(len(prompts))
    found = []
    for slot in slots:
        runner.start(slot)
        runner.run(slot, prompts[slot][:-NUM_SINGLE])
    try:
        with model_errors("in a padded batch"):
            for back in range(-NUM_SINGLE, 0):
                tokens = [prompt[back] for prompt in prompts]
                found.append(runner.run_together(slots, tokens))
    finally:
        for slot in slots:
            runner.release(slot)
    for slot, prompt in enumerate(prompts):
        expected = runner.whole_logits(prompt)[-NUM_SINGLE:]
        _compare([(torch.stack(found)[:, slot], expected)], dtype, "in a padded batch")


def _compare(rows: Sequence[Rows], dtype: torch.dtype, where: str) -> None:
    """The median row decides: in a mixture of experts rounding may send a token elsewhere."""
    found = torch.cat([pair[0] for pair in rows]).float()
    expected = torch.cat([pair[1] for pair in rows]).float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    error = float(((found - expected).norm(dim=-1) / spread).median())
    limit = MAX_ERROR.get(dtype, MAX_ERROR_ROUNDED)
    if not error <= limit:  # also if it is not a number
        raise UnsupportedModelError(
            f"{where} its logits differ from its own by {error:.2g} of their spread; "
            f"rounding explains up to {limit:g}"
        )
