"""Chunks become rows: where each token is stored, which blocks it reads, and in which order rows
come."""

import torch

from common.messages import Sampling
from worker.engine.batch import BlockTables, GroupLimits
from worker.engine.plan import Chunk, KvCacheLayout, SequenceStart


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


def a_translation(slot: int, num_tokens: int, blocks: tuple[int, ...]) -> SequenceStart:
    tokens = tuple(range(100 * slot, 100 * slot + num_tokens))
    return SequenceStart(slot, (0,), (), Sampling(), encoder_tokens=tokens, encoder_blocks=blocks)


def test_encoder_inputs_are_laid_end_to_end_in_blocks_of_their_own() -> None:
    plain = SequenceStart(2, (5, 6), (), Sampling())
    starts = [a_translation(1, 6, (9, 3)), plain, a_translation(0, 4, (5,))]
    batch = tables().encoder_batch(starts)
    assert batch.tokens.tolist() == [100, 101, 102, 103, 104, 105, 0, 1, 2, 3]
    assert batch.attention.bounds == ((0, 6), (6, 10))
    assert batch.attention.cache_rows.tolist() == [36, 37, 38, 39, 12, 13, 20, 21, 22, 23]
    assert batch.attention.entered_blocks.tolist() == [3]
    assert tables().encoder_batch([plain]) is None


def test_a_decoder_sees_its_sequence_s_whole_input() -> None:
    state = tables()
    for start in (a_translation(0, 3, (7,)), a_translation(1, 6, (9, 3))):
        state.start(start)
    batch = state.batch([Chunk(0, 5, (1,), (0, 1), True), Chunk(1, 0, (2,), (2,), True)])
    assert batch.tokens.tolist() == [2, 1], "the longer input first"
    (group,) = batch.attention.cross.groups
    assert group.blocks.tolist() == [9, 3, 7, 7] and group.keep == slice(0, 6)
    assert (group.mask[:, 0, 0] == 0).tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    batch = state.batch([Chunk(1, 1, (1, 2), (), True)])
    (chunk,) = batch.attention.cross.chunks
    assert chunk.blocks.tolist() == [9, 3] and chunk.num_keys == 6
    assert torch.equal(chunk.mask, torch.zeros(2, 6))
    state.clear(1)
    assert state.batch([Chunk(1, 0, (1,), (4,), True)]).attention.cross is None


def test_cross_attention_is_grouped_though_its_lengths_are_not_sorted() -> None:
    state = tables(limits=GroupLimits(max_padding_tokens=4))
    for slot, num_tokens in enumerate((8, 7, 1, 8)):
        state.start(a_translation(slot, num_tokens, (2 * slot, 2 * slot + 1)))
    chunks = [Chunk(slot, 0, (1,), (20 + slot,), True) for slot in range(3)]
    several = Chunk(3, 0, (1, 2), (23,), True)
    cross = state.batch([*chunks, several]).attention.cross
    assert [(group.start, group.stop) for group in cross.groups] == [(0, 2), (2, 3)]
    assert [(chunk.start, chunk.stop) for chunk in cross.chunks] == [(3, 5)]
