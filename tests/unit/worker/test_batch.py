"""Chunks become rows: where each token is stored, which blocks it reads, and in which order rows
come."""

import torch

from worker.engine.batch import BlockTables, GroupLimits
from worker.engine.plan import Chunk, KvCacheLayout


def tables(
    *, limits: GroupLimits | None = None, windows: tuple[int | None, ...] = (None,)
) -> BlockTables:
    return BlockTables(
        KvCacheLayout(num_blocks=32, block_size=4, num_slots=8),
        max_total_tokens=32,
        windows=windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        token_bytes=100,
        limits=limits,
    )


def test_a_prompt_is_stored_in_its_blocks() -> None:
    batch = tables().batch([Chunk(0, 0, (10, 11, 12, 13, 14), (7, 2), True)])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.attention.cache_rows.tolist() == [28, 29, 30, 31, 8]
    assert batch.sampled_rows.tolist() == [4]
    assert batch.sampled_positions == (5,)
    (chunk,) = batch.attention.views[None].chunks
    assert chunk.blocks is None and chunk.mask is None


def test_a_table_grows_and_a_cleared_one_starts_over() -> None:
    state = tables()
    state.batch([Chunk(3, 0, (1, 2, 3, 4), (9,), False)])
    batch = state.batch([Chunk(3, 4, (5,), (1,), True)])
    assert batch.attention.cache_rows.tolist() == [4]
    (group,) = batch.attention.views[None].groups
    assert group.blocks.tolist() == [9, 1]
    assert group.keep == slice(0, 5) and group.mask is None
    state.clear(3)
    batch = state.batch([Chunk(3, 0, (5,), (6,), True)])
    assert batch.attention.cache_rows.tolist() == [24]


def test_prefix_blocks_are_read_but_not_written() -> None:
    batch = tables().batch([Chunk(0, 8, (1, 2), (3, 4, 5), True)])
    assert batch.attention.cache_rows.tolist() == [20, 21]
    (chunk,) = batch.attention.views[None].chunks
    assert chunk.blocks.tolist() == [3, 4, 5] and chunk.num_keys == 10


def test_rows_are_sorted_but_results_keep_the_plan_s_order() -> None:
    batch = tables().batch(
        [
            Chunk(0, 2, (100,), (0,), True),
            Chunk(1, 0, (200, 201, 202), (1,), False),
            Chunk(2, 9, (300,), (2, 3, 4), True),
        ]
    )
    assert batch.tokens.tolist() == [300, 100, 200, 201, 202]  # single tokens first, longest first
    assert batch.first_rows == (1, 2, 0)
    assert batch.sampled_slots == (0, 2)
    assert batch.sampled_rows.tolist() == [1, 0]
    assert batch.sampled_positions == (3, 10)


def test_similar_lengths_are_attended_together() -> None:
    def groups(limits: GroupLimits | None) -> list[tuple[int, int]]:
        starts = (28, 27, 5, 4, 3)
        chunks = [
            Chunk(slot, start, (1,), tuple(range(start // 4 + 1)), True)
            for slot, start in enumerate(starts)
        ]
        view = tables(limits=limits).batch(chunks).attention.views[None]
        return [(group.start, group.stop) for group in view.groups]

    assert groups(None) == [(0, 5)]
    assert groups(GroupLimits(max_padding_tokens=10)) == [(0, 2), (2, 5)]
    assert groups(GroupLimits(max_padding_tokens=0)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    # 100 bytes a token: two sequences of 29 tokens are 5,800.
    assert groups(GroupLimits(1000, max_group_bytes=6000)) == [(0, 2), (2, 5)]


def test_a_window_reads_only_its_own_blocks() -> None:
    batch = tables(windows=(None, 3)).batch([Chunk(0, 9, (1,), (5, 6, 7), True)])
    (every,) = batch.attention.views[None].groups
    (near,) = batch.attention.views[3].groups
    assert every.blocks.tolist() == [5, 6, 7] and every.keep == slice(0, 10)
    assert near.blocks.tolist() == [6, 7] and near.keep == slice(3, 6)  # positions 7, 8, 9


def test_a_block_is_cleaned_when_it_is_begun_and_not_filled() -> None:
    state = tables()

    def entered(chunk: Chunk) -> list[int]:
        blocks = state.batch([chunk]).attention.entered_blocks
        return [] if blocks is None else blocks.tolist()

    assert entered(Chunk(0, 0, (1, 2, 3, 4, 5, 6), (8, 9), True)) == [9]
    assert entered(Chunk(0, 6, (7,), (), True)) == []
    assert entered(Chunk(0, 7, (8,), (), True)) == []
    assert entered(Chunk(0, 8, (9,), (10,), True)) == [10]
    assert entered(Chunk(1, 0, (1, 2, 3, 4), (11,), True)) == []
    assert entered(Chunk(1, 4, (1, 2, 3, 4), (12,), True)) == []
