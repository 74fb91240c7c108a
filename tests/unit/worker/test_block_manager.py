"""Allocation, sharing and eviction of KV blocks."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.block_manager import ASK_EVERY, BlockManager


def hashes_of(manager, tokens):
    hashes = []
    manager.extend_hashes(hashes, tokens, len(tokens))
    return hashes


def fill(manager, tokens):
    """A table that holds `tokens`, its full blocks registered."""
    hashes = hashes_of(manager, tokens)
    shared = manager.match_prefix(hashes)
    table = manager.allocate(manager.blocks_for(len(tokens)), shared)
    for block, key in zip(table, hashes, strict=False):
        manager.register(block, key)
    return table


def test_a_common_beginning_is_shared():
    manager = BlockManager(8, 4)
    first = fill(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = fill(manager, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert first[:2] == second[:2] and first[2] != second[2]
    assert manager.num_used == 4
    manager.check([first, second])
    manager.free(first)
    manager.free(second)
    assert manager.num_free == 8 and manager.num_cached == 2
    manager.check([])


def test_a_block_is_known_by_all_that_comes_before_it():
    manager = BlockManager(8, 2)
    table = fill(manager, [1, 2, 3, 4])
    assert manager.match_prefix(hashes_of(manager, [9, 9, 3, 4])) == []
    assert manager.match_prefix(hashes_of(manager, [1, 2, 9, 9])) == table[:1]
    assert (
        manager.match_prefix(hashes_of(BlockManager(8, 2, salt="other model"), [1, 2, 3, 4])) == []
    )
    manager.check([table])


def test_hashes_are_extended_not_computed_again():
    manager = BlockManager(8, 2)
    tokens = [1, 2, 3, 4, 5]
    hashes = []
    manager.extend_hashes(hashes, tokens, 3)
    assert len(hashes) == 1
    manager.extend_hashes(hashes, tokens, 5)
    assert hashes == hashes_of(manager, tokens) and len(hashes) == 2


def test_eviction_takes_the_least_recently_used_and_the_end_before_the_beginning():
    manager = BlockManager(4, 2)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    table_old, table_new = fill(manager, old), fill(manager, new)
    manager.free(table_old)
    manager.free(table_new)
    assert manager.take() == table_old[1]
    assert manager.match_prefix(hashes_of(manager, old)) == table_old[:1]
    assert manager.take() == table_old[0]
    assert manager.match_prefix(hashes_of(manager, new)) == table_new
    manager.check([table_old[::-1]])


def test_a_hit_saves_a_block_from_eviction():
    manager = BlockManager(3, 2)
    manager.free(fill(manager, [1, 2, 3, 4]))
    shared = manager.match_prefix(hashes_of(manager, [1, 2, 3, 4]))
    assert not manager.can_allocate(4, shared) and manager.can_allocate(3, shared)
    table = manager.allocate(3, shared)
    assert table[:2] == shared and manager.num_free == 0
    assert manager.can_allocate(2, shared) and not manager.can_allocate(1)
    manager.check([table])


def test_the_same_content_computed_twice_is_indexed_once():
    manager = BlockManager(4, 2)
    (key,) = hashes_of(manager, [1, 2])
    first, second = manager.take(), manager.take()
    manager.register(first, key)
    manager.register(second, key)
    manager.free([second])
    assert manager.num_cached == 0
    manager.free([first])
    assert manager.num_cached == 1
    manager.check([])


def test_forgotten_blocks_are_not_found_and_not_kept():
    manager = BlockManager(4, 2)
    table = fill(manager, [1, 2, 3, 4])
    manager.forget(table)
    assert manager.match_prefix(hashes_of(manager, [1, 2, 3, 4])) == []
    manager.check([table])
    manager.free(table)
    assert manager.num_cached == 0
    manager.check([])


def test_without_spare_memory_old_blocks_are_evicted_before_new_ones_are_touched():
    manager = BlockManager(1000, 2, has_spare_memory=lambda: False)
    for first in range(0, 600, 3):
        table = fill(manager, [first, first, first + 1, first + 1])
        manager.check([table])
        manager.free(table)
    assert manager.num_touched == 2, "what one table needs"
    assert manager.num_free == 1000 and manager.num_cached == 2


def test_without_spare_memory_what_runs_still_grows():
    manager = BlockManager(6, 2, has_spare_memory=lambda: False)
    tables = [fill(manager, [n, n, n, n]) for n in range(3)]
    assert manager.num_touched == 6 and not manager.can_allocate(1)
    manager.check(tables)


def test_with_spare_memory_the_whole_cache_keeps_prefixes():
    manager = BlockManager(100, 2)
    for n in range(200):
        manager.free(fill(manager, [n, n]))
    assert manager.num_touched == manager.num_cached == 100


def test_memory_is_asked_for_now_and_then():
    answers = [True, False, True]
    manager = BlockManager(1000, 2, has_spare_memory=lambda: answers.pop(0))
    sizes = []
    for n in range(3 * ASK_EVERY + 1):  # the first has nothing to evict, and so does not ask
        manager.free(fill(manager, [n, n]))
        sizes.append(manager.num_touched)
    assert not answers
    assert sizes[ASK_EVERY] == sizes[2 * ASK_EVERY] == ASK_EVERY + 1
    assert sizes[-1] == 2 * ASK_EVERY + 1


def test_empty_blocks_come_before_fresh_ones():
    manager = BlockManager(8, 2)
    table = manager.allocate(3)
    manager.free(table)
    assert sorted(manager.allocate(3)) == sorted(table) and manager.num_touched == 3


def test_misuse_is_an_assertion():
    manager = BlockManager(1, 2)
    table = [manager.take()]
    with pytest.raises(AssertionError, match="no free block"):
        manager.take()
    manager.free(table)
    with pytest.raises(AssertionError, match="twice"):
        manager.free(table)
    with pytest.raises(AssertionError, match="reference"):
        manager.check([table])


class AnyUse(RuleBasedStateMachine):
    """Random tables over few tokens; a shadow of each block proves that a hit is right."""

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), has_memory=st.booleans()
    )
    def build(self, num_blocks, block_size, has_memory):
        self.manager = BlockManager(num_blocks, block_size, has_spare_memory=lambda: has_memory)
        self.tables = []
        self.content = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def admit(self, tokens):
        manager, size = self.manager, self.manager.block_size
        hashes = hashes_of(manager, tokens)
        shared = manager.match_prefix(hashes)
        for index, block in enumerate(shared):
            assert self.content[block] == tokens[: (index + 1) * size]
        num_blocks = manager.blocks_for(len(tokens))
        if not manager.can_allocate(num_blocks, shared):
            return
        table = manager.allocate(num_blocks, shared)
        for index in range(len(shared), len(hashes)):
            self.content[table[index]] = tokens[: (index + 1) * size]
            manager.register(table[index], hashes[index])
        self.tables.append(table)

    @precondition(lambda self: self.tables and self.manager.can_allocate(1))
    @rule(data=st.data())
    def grow(self, data):
        data.draw(st.sampled_from(self.tables)).append(self.manager.take())

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        self.manager.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def holds(self):
        self.manager.check(self.tables)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
