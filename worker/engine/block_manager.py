"""Who owns which block of the KV cache, and which blocks hold a common beginning. No torch.

Every block is in exactly one of four places, and the first three count as free:

    empty    [ 5 | 9 | 2 ]                  nothing worth keeping; taken first
    fresh    [ 10 | 11 | 12 | 13 | ... ]    never taken: the kernel gave no memory for them yet
    cached   oldest [ 7 | 1 | 8 ] newest    full, indexed by content, in no table; evicted in turn
    used     table A [ 0 | 3 | 4 ]          references: block 0 has 2, the others 1
             table B [ 0 | 6 ]              block 0 is shared: full, hence never written again

A fresh block takes memory from the machine for good, so once that has none to spare, cached blocks
are evicted first, and the cache grows only by what runs.

Only full blocks are indexed. The key of a block is a hash of everything up to its end, so equal
keys mean equal keys and values (same model, same positions, same tokens before):

    tokens   a b c d | e f g h | i j          block size 4
    hash     h0 = H(root, abcd)   h1 = H(h0, efgh)   (the third block is not full: private, no hash)
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

# Asking for spare memory may take milliseconds, and so few blocks are no danger to a machine.
ASK_EVERY = 64


class BlockManager:
    """Allocation of KV blocks with reference counts, and the index of the prefix cache.

    Args:
        salt: goes into every hash: two managers with different salts never agree on a key.
        has_spare_memory: whether fresh blocks may be taken to spare cached ones; asked now and
            then. The default is for a cache whose memory was taken when it was made.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        salt: str = "",
        has_spare_memory: Callable[[], bool] = lambda: True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._root = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        self._references = [0] * num_blocks
        self._empty: list[int] = []
        self.num_touched = 0  # how far the cache has grown: fresh blocks are taken in order
        self._ask_spare_memory = has_spare_memory
        self._has_spare_memory = True
        self._num_until_ask = 0
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had: empty and fresh ones, and cached ones that nobody uses."""
        return len(self._empty) + self._num_fresh + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and that may still be found by `match_prefix`."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def extend_hashes(self, hashes: list[bytes], tokens: list[int], num_tokens: int) -> None:
        """Append the hashes that are missing of the full blocks in the first `num_tokens`."""
        size = self.block_size
        parent = hashes[-1] if hashes else self._root
        for index in range(len(hashes), num_tokens // size):
            block = array("I", tokens[index * size : (index + 1) * size]).tobytes()
            parent = hashlib.blake2b(parent + block, digest_size=16).digest()
            hashes.append(parent)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning. Not held: `allocate` with them at once."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> bool:
        """Whether a table of `num_blocks` can be had that begins with `shared`."""
        num_revived = sum(1 for block in shared if not self._references[block])
        return num_blocks - len(shared) + num_revived <= self.num_free

    def allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> list[int]:
        """A table of `num_blocks` that begins with `shared`; ask `can_allocate` first."""
        for block in shared:  # before any eviction, which could take them
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
        return [*shared, *(self.take() for _ in range(num_blocks - len(shared)))]

    def take(self) -> int:
        """One block, for a table that grows. The caller has asked `can_allocate`."""
        if self._empty:
            block = self._empty.pop()
        elif self._num_fresh and (not self._cached or self._may_grow()):
            block = self.num_touched
            self.num_touched += 1
        else:
            assert self._cached, "no free block: ask can_allocate first"
            block, _ = self._cached.popitem(last=False)
            key = self._hash_of[block]
            assert key is not None
            del self._block_of[key]
            self._hash_of[block] = None
        self._references[block] = 1
        return block

    def register(self, block: int, key: bytes) -> None:
        """Index a block that its owner has filled, unless its content is indexed already."""
        assert self._references[block], "only its owner knows that a block is full"
        if key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def forget(self, table: Sequence[int]) -> None:
        """Take blocks that are in use out of the index: what they hold cannot be trusted."""
        for block in table:
            assert self._references[block], "a block that nobody uses is not in a table"
            key = self._hash_of[block]
            if key is not None:
                del self._block_of[key]
                self._hash_of[block] = None

    def free(self, table: Sequence[int]) -> None:
        """Give a table back. Its end is evicted first: without its beginning it is lost."""
        for block in reversed(table):
            assert self._references[block], f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash_of[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    @property
    def _num_fresh(self) -> int:
        return self.num_blocks - self.num_touched

    def _may_grow(self) -> bool:
        if not self._num_until_ask:
            self._has_spare_memory = self._ask_spare_memory()
            self._num_until_ask = ASK_EVERY
        self._num_until_ask -= 1
        return self._has_spare_memory

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given all tables in use. For tests and idle moments."""
        references = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block is twice in one table: {table}"
            for block in table:
                references[block] += 1
        assert references == self._references, "reference counts do not match the tables"
        used = {block for block, count in enumerate(references) if count}
        fresh = range(self.num_touched, self.num_blocks)
        places = [*self._empty, *fresh, *self._cached, *used]
        assert sorted(places) == list(range(self.num_blocks)), "a block is lost, or in two places"
        assert len(used) == self.num_used
        indexed = {block: key for block, key in enumerate(self._hash_of) if key is not None}
        assert indexed == {block: key for key, block in self._block_of.items()}, (
            "index and hashes disagree"
        )
        assert set(self._cached) <= indexed.keys(), "a cached block cannot be found"
        assert not set(self._empty) & indexed.keys(), "an empty block can be found"
