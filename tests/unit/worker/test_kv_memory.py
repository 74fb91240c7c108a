"""The size of the KV cache: what was asked for, what fits, or a clear sentence when it does not."""

import pytest
import torch

from worker.engine.memory import KvShape, allocate_kv_cache, longest_sequence, plan_kv_cache
from worker.engine.plan import KvCacheLayout

# 2 * 3 layers * 2 heads * 8 features * 2 bytes are 192 bytes a token, 768 a block of 4.
SHAPE = KvShape(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)


def plan(**changes: object) -> KvCacheLayout:
    values = dict(block_size=4, num_slots=8, max_total_tokens=30, max_batch_total_tokens=None)
    values |= dict(memory_fraction=0.5, free_bytes=100 * 768) | changes
    return plan_kv_cache(SHAPE, **values)


def test_a_token_of_the_shape() -> None:
    assert SHAPE.token_bytes == 192


def test_the_default_is_the_share_of_free_memory() -> None:
    assert plan().num_blocks == 50


def test_never_more_than_all_slots_can_fill() -> None:
    assert plan(free_bytes=10**9).num_blocks == 8 * 8


def test_two_tables_of_a_sequence_may_each_end_within_a_block() -> None:
    assert plan(free_bytes=10**9, tables_per_sequence=2).num_blocks == 8 * 9
    with pytest.raises(ValueError, match="one sequence of 30 tokens.* Given: 32"):
        plan(max_batch_total_tokens=32, tables_per_sequence=2)


def test_what_was_asked_for() -> None:
    assert plan(max_batch_total_tokens=43).num_blocks == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(free_bytes=10 * 768), "Lower `max_total_tokens` or raise `memory_fraction`"),
        (dict(max_batch_total_tokens=29), "30 tokens, in whole blocks of 4. Given: 29"),
        (dict(max_batch_total_tokens=4000), "`max_batch_total_tokens` of 4000 needs"),
    ],
)
def test_what_does_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_shorter_sequence_may_be_enough() -> None:
    scarce = dict(free_bytes=10 * 768)  # of which half is 5 blocks
    layout = plan(**scarce, min_total_tokens=20)
    assert layout.num_blocks == 5 and longest_sequence(layout) == 20
    assert longest_sequence(layout, tables_per_sequence=2) == 16
    assert plan(max_batch_total_tokens=24, min_total_tokens=20).num_blocks == 6
    with pytest.raises(ValueError, match="must hold one sequence of 21 tokens"):
        plan(**scarce, min_total_tokens=21)
    with pytest.raises(ValueError, match="must hold one sequence of 20 tokens"):
        plan(**scarce, min_total_tokens=20, tables_per_sequence=2)
    with pytest.raises(ValueError, match="one sequence of 20 tokens.* Given: 19"):
        plan(max_batch_total_tokens=19, min_total_tokens=20)


def test_room_for_full_length_does_not_shrink() -> None:
    assert plan(min_total_tokens=4) == plan()


def test_the_cache_is_zeros_on_a_cache_line() -> None:
    cache = allocate_kv_cache(plan(), SHAPE, torch.device("cpu"))
    assert len(cache.layers) == 3
    for rows in cache.layers:
        assert rows.shape == (50, 4, 4, 8) and rows.dtype == torch.bfloat16
        assert rows.data_ptr() % 64 == 0 and not rows.any()
