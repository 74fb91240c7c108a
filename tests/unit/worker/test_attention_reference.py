"""The attention that models use, against its definition in `worker/kernels/reference.py`."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from common.messages import Sampling
from worker.engine.batch import BlockTables, GroupLimits
from worker.engine.plan import Chunk, KvCacheLayout, SequenceStart
from worker.kernels import reference, sdpa
from worker.kernels.bias import with_distance_bias
from worker.layers.alibi import Alibi, alibi_slopes
from worker.layers.build import Build
from worker.parallel.group import Shard

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
    has_alibi: bool = False,
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
    metadata, slopes = batch.attention, None
    if has_alibi:
        slopes = alibi_slopes(num_heads)
        alibi = Alibi(num_heads, Build(dtype=torch.float32))
        metadata = with_distance_bias(metadata, batch.positions, alibi, kv_heads)
    attended = sdpa.paged_attention(q, kv, rows, metadata, scale=0.3, window=window)
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
            slopes=slopes,
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


@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 25), st.sampled_from([1, 1, 2, 5, 9])), min_size=1, max_size=6
    ),
    heads=st.sampled_from([(4, 4), (5, 5), (6, 2), (3, 1)]),
    limits=st.sampled_from([None, GroupLimits(), GroupLimits(4, 10**9)]),
)
@settings(max_examples=60, deadline=None)
def test_alibi(
    lengths: list[tuple[int, int]], heads: tuple[int, int], limits: GroupLimits | None
) -> None:
    check(
        lengths, num_heads=heads[0], kv_heads=heads[1], window=None, limits=limits, has_alibi=True
    )


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 7, 8, 12, 112])
def test_slopes_are_those_of_transformers(num_heads: int) -> None:
    mask = torch.ones(1, 2)
    expected = build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), expected)


def test_a_shard_has_the_slopes_of_its_own_heads() -> None:
    shards = [Alibi(6, Build(dtype=torch.float32, shard=Shard(rank, 3))) for rank in range(3)]
    distances = torch.tensor([1, 5])
    joined = torch.cat([shard(distances) for shard in shards])
    assert torch.equal(joined, -alibi_slopes(6)[:, None] * distances)


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


def test_cross_attention_reads_the_encoder_s_blocks_and_all_of_them() -> None:
    """Each sequence's input is of another length; two rows of one sequence see the same."""
    torch.manual_seed(0)
    rows = torch.full((LAYOUT.num_blocks, LAYOUT.block_size, 4, HEAD_DIM), float("nan"))
    state = tables((None,), GroupLimits(max_padding_tokens=8))
    inputs = {0: (3, (7,)), 1: (9, (1, 30, 2)), 2: (8, (9, 8)), 3: (5, (50, 4))}
    starts = [
        SequenceStart(slot, (0,), (), Sampling(), encoder_tokens=(1,) * n, encoder_blocks=blocks)
        for slot, (n, blocks) in inputs.items()
    ]
    for start in starts:
        state.start(start)
    encoder = state.encoder_batch(starts).attention
    kv = torch.randn(25, 4, HEAD_DIM)
    sdpa.store(kv, rows, encoder)
    sizes = {0: 1, 1: 1, 2: 1, 3: 2}
    chunks = [Chunk(slot, 0, (1,) * size, (40 + slot,), True) for slot, size in sizes.items()]
    batch = state.batch(chunks)
    q = torch.randn(5, 2, HEAD_DIM)
    attended = sdpa.cross_attention(q, rows, batch.attention, scale=0.3)
    for slot, (length, blocks) in inputs.items():
        here = slice(batch.first_rows[slot], batch.first_rows[slot] + sizes[slot])
        expected = reference.attend(
            q[here],
            rows,
            block_tables=[blocks] * sizes[slot],
            positions=[length - 1] * sizes[slot],
            scale=0.3,
        )
        torch.testing.assert_close(attended[here], expected, atol=1e-5, rtol=1e-5)
