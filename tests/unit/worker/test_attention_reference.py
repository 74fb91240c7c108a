"""The attention that models use, against its definition in `worker/kernels/reference.py`."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.batch import BlockTables, GroupLimits
from worker.engine.plan import Chunk, KvCacheLayout
from worker.kernels import reference, sdpa

LAYOUT = KvCacheLayout(num_blocks=64, block_size=4, num_slots=6)
MAX_TOKENS = 40
HEAD_DIM = 8


def tables(windows: tuple[int | None, ...], limits: GroupLimits | None) -> BlockTables:
    return BlockTables(
        LAYOUT,
        max_total_tokens=MAX_TOKENS,
        windows=windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        token_bytes=64,
        limits=limits,
    )


def check(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int,
    kv_heads: int,
    window: int | None,
    limits: GroupLimits | None,
) -> None:
    """One step of sequences with (cached, new) tokens, each on blocks of its own in shuffled
    order."""
    torch.manual_seed(0)
    blocks = list(range(LAYOUT.num_blocks))
    random.Random(0).shuffle(blocks)
    rows = torch.randn(LAYOUT.num_blocks, LAYOUT.block_size, 2 * kv_heads, HEAD_DIM)
    chunks, block_tables = [], {}
    for slot, (cached, new) in enumerate(lengths):
        count = -(-(cached + new) // LAYOUT.block_size)
        block_tables[slot] = [blocks.pop() for _ in range(count)]
        chunks.append(Chunk(slot, cached, tuple(range(new)), tuple(block_tables[slot]), True))
    batch = tables((window, None), limits).batch(chunks)
    num_tokens = len(batch.tokens)
    q = torch.randn(num_tokens, num_heads, HEAD_DIM)
    kv = torch.randn(num_tokens, 2 * kv_heads, HEAD_DIM)
    attended = sdpa.paged_attention(q, kv, rows, batch.attention, scale=0.3, window=window)
    for chunk, first in zip(chunks, batch.first_rows, strict=True):
        here = slice(first, first + len(chunk.tokens))
        positions = range(chunk.start, chunk.start + len(chunk.tokens))
        table = block_tables[chunk.slot]
        expected = reference.attend(
            q[here],
            rows,
            block_tables=[table] * len(positions),
            positions=positions,
            scale=0.3,
            window=window,
        )
        torch.testing.assert_close(attended[here], expected, atol=1e-5, rtol=1e-5)
        for row, position in zip(range(here.start, here.stop), positions, strict=True):
            assert torch.equal(rows[table[position // 4], position % 4], kv[row])


@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 25), st.sampled_from([1, 1, 1, 2, 5, 9])), min_size=1, max_size=6
    ),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    limits=st.sampled_from(
        [None, GroupLimits(), GroupLimits(4, 10**9), GroupLimits(10**9, 64 * 30)]
    ),
)
@settings(max_examples=150, deadline=None)
def test_any_mix_of_decoding_and_prompts(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    limits: GroupLimits | None,
) -> None:
    check(lengths, num_heads=heads[0], kv_heads=heads[1], window=window, limits=limits)


def test_the_reference_on_numbers_that_can_be_checked_by_hand() -> None:
    rows = torch.zeros(1, 4, 2, 1)
    rows[0, :3, 1, 0] = torch.tensor(
        [1.0, 2.0, 6.0]
    )  # values; all keys are 0, so all weights are equal
    q = torch.ones(2, 1, 1)
    seen = reference.attend(q, rows, block_tables=[[0], [0]], positions=[1, 2], scale=1.0)
    assert seen.flatten().tolist() == pytest.approx([1.5, 3.0])
    windowed = reference.attend(
        q, rows, block_tables=[[0], [0]], positions=[1, 2], scale=1.0, window=2
    )
    assert windowed.flatten().tolist() == pytest.approx([1.5, 4.0])
