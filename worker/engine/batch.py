"""A plan's chunks as tensors: tokens, positions, and which cache blocks each attends to. Knows no
model.

Slot state is a table of blocks, one row a slot; position p of slot s lives in block table[s, p //
4] at p % 4:

    table      slot 0  | 7 | 2 | 9 |           chunk: slot 0, positions 9-10, two tokens
               slot 1  | 2 | 5 |               cache rows: 9 * 4 + 1, 9 * 4 + 2
                         ^ shared prefix        reads blocks 7, 2, 9; the first 11 tokens of them

Rows of a batch are not in the plan's order: single tokens come first, sorted by length
(kernels/metadata.py). The decoder of an encoder-decoder model also attends to the blocks of its
sequence's encoder input, in a second table; these inputs are the longer ones and sort first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from worker.engine.encoder_batch import EncoderBatch, encoder_batch
from worker.engine.plan import Chunk, KvCacheLayout, SequenceStart
from worker.kernels.metadata import AttentionMetadata, AttentionView, DecodeGroup, PromptChunk


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model and a sampler need for one step."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    attention: AttentionMetadata
    sampled_rows: torch.Tensor  # [S] int64, in the order of the plan's sampled chunks
    sampled_slots: tuple[int, ...]
    sampled_positions: tuple[int, ...]  # of the tokens to be chosen
    first_rows: tuple[int, ...]  # of each chunk of the plan


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """When decoding sequences are attended together.

    Together they are padded to the longest; apart, each group costs one more round of kernel calls.
    And a group whose gathered keys and values leave the CPU's cache takes several times longer than
    two smaller ones.
    """

    max_padding_tokens: int = 256
    # 3 MiB groups ran well and 12 MiB ones did not (1 MiB of L2 a core); the value is not tuned.
    max_group_bytes: int = 2 * 2**20


class BlockTables:
    """The block table of every slot, and how a step's index tensors are made from it.

    Args:
        layout: of the cache.
        max_total_tokens: longest sequence.
        windows: of the model's layers, each once; None is no window.
        token_bytes: of one layer's keys and values.
        limits: of decoding groups; None is one group for all.
    """

    def __init__(
        self,
        layout: KvCacheLayout,
        *,
        max_total_tokens: int,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        device: torch.device,
        token_bytes: int,
        limits: GroupLimits | None,
    ) -> None:
        self._block_size = layout.block_size
        self._table = np.zeros(
            (layout.num_slots, -(-max_total_tokens // layout.block_size)), dtype=np.int64
        )
        self._num_blocks = np.zeros(layout.num_slots, dtype=np.int64)
        self._cross_table = np.zeros_like(self._table)
        self._num_encoder_tokens = np.zeros(layout.num_slots, dtype=np.int64)
        self._windows = tuple(dict.fromkeys(windows))
        self._dtype = dtype
        self._device = device
        self._token_bytes = token_bytes
        self._limits = limits

    def start(self, start: SequenceStart) -> None:
        """The slot has a new sequence."""
        self.clear(start.slot)
        self._num_encoder_tokens[start.slot] = len(start.encoder_tokens)
        self._cross_table[start.slot, : len(start.encoder_blocks)] = start.encoder_blocks

    def clear(self, slot: int) -> None:
        """The slot has no sequence."""
        self._num_blocks[slot] = self._num_encoder_tokens[slot] = 0

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """Append the chunks' new blocks to the tables, and lay the chunks out as rows."""
        for chunk in chunks:
            self._append(chunk)
        order = self._order(chunks)
        ordered = [chunks[i] for i in order]
        sizes = np.fromiter((len(chunk.tokens) for chunk in ordered), np.int64, len(ordered))
        stops = np.cumsum(sizes)
        first_rows = np.empty_like(stops)
        first_rows[order] = stops - sizes
        slots = np.fromiter((chunk.slot for chunk in ordered), np.int64, len(ordered))
        starts = np.fromiter((chunk.start for chunk in ordered), np.int64, len(ordered))
        tokens = np.concatenate([np.array(chunk.tokens, dtype=np.int64) for chunk in ordered])
        # Row r of a chunk that begins at row f has position start + (r - f).
        positions = np.arange(len(tokens)) + np.repeat(starts - (stops - sizes), sizes)
        sampled = [i for i, chunk in enumerate(chunks) if chunk.is_sampled]
        last_rows = np.array(
            [first_rows[i] + len(chunks[i].tokens) - 1 for i in sampled], dtype=np.int64
        )
        return Batch(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            attention=AttentionMetadata(
                cache_rows=self._tensor(self._cache_rows(np.repeat(slots, sizes), positions)),
                entered_blocks=self._entered_blocks(slots, starts, starts + sizes),
                views={
                    window: self._view(window, slots, starts, stops, sizes)
                    for window in self._windows
                },
                cross=self._cross_view(slots, stops, sizes),
            ),
            sampled_rows=self._tensor(last_rows),
            sampled_slots=tuple(chunks[i].slot for i in sampled),
            sampled_positions=tuple(chunks[i].start + len(chunks[i].tokens) for i in sampled),
            first_rows=tuple(first_rows.tolist()),
        )

    def encoder_batch(self, started: Sequence[SequenceStart]) -> EncoderBatch | None:
        """The encoder inputs of the sequences that start, or None if there are none."""
        inputs = [start for start in started if start.encoder_tokens]
        if not inputs:
            return None
        return encoder_batch(inputs, block_size=self._block_size, device=self._device)

    def _order(self, chunks: Sequence[Chunk]) -> list[int]:
        num_encoder_tokens = self._num_encoder_tokens.tolist()

        def key(index: int) -> tuple[bool, int, int]:
            chunk = chunks[index]
            return len(chunk.tokens) > 1, -num_encoder_tokens[chunk.slot], -chunk.start

        return sorted(range(len(chunks)), key=key)

    def _append(self, chunk: Chunk) -> None:
        held = self._num_blocks[chunk.slot]
        count = held + len(chunk.new_blocks)
        needed = -(-(chunk.start + len(chunk.tokens)) // self._block_size)
        assert needed <= count <= self._table.shape[1], (
            f"slot {chunk.slot}: {needed} blocks needed, {count} held"
        )
        self._table[chunk.slot, held:count] = chunk.new_blocks
        self._num_blocks[chunk.slot] = count

    def _cache_rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        blocks = self._table[slots, positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size

    def _entered_blocks(
        self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> torch.Tensor | None:
        """The chunks' last blocks, where a chunk wrote a block's first token but not its last."""
        last = ends // self._block_size
        is_entered = (ends % self._block_size > 0) & (last * self._block_size >= starts)
        if not is_entered.any():
            return None
        return self._tensor(self._table[slots[is_entered], last[is_entered]])

    def _view(
        self,
        window: int | None,
        slots: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        sizes: np.ndarray,
    ) -> AttentionView:
        num_single = int((sizes == 1).sum())
        lengths = starts[:num_single] + 1
        groups = tuple(
            self._group(self._table, window, slots[first:last], lengths[first:last], first)
            for first, last in self._group_bounds(window, lengths)
        )
        chunks = tuple(
            self._chunk(
                window, int(slots[i]), int(starts[i]), int(stops[i] - sizes[i]), int(stops[i])
            )
            for i in range(num_single, len(sizes))
        )
        return AttentionView(groups, chunks)

    def _cross_view(
        self, slots: np.ndarray, stops: np.ndarray, sizes: np.ndarray
    ) -> AttentionView | None:
        """Every row sees its sequence's whole encoder input."""
        lengths = self._num_encoder_tokens[slots]
        if not lengths.any():
            return None
        num_single = int((sizes == 1).sum())
        groups = tuple(
            self._group(self._cross_table, None, slots[first:last], lengths[first:last], first)
            for first, last in self._group_bounds(None, lengths[:num_single])
        )
        chunks = tuple(
            self._cross_chunk(int(slots[i]), int(stops[i] - sizes[i]), int(stops[i]))
            for i in range(num_single, len(sizes))
        )
        return AttentionView(groups, chunks)

    def _cross_chunk(self, slot: int, first_row: int, last_row: int) -> PromptChunk:
        num_keys = int(self._num_encoder_tokens[slot])
        return PromptChunk(
            start=first_row,
            stop=last_row,
            blocks=self._tensor(self._cross_table[slot, : -(-num_keys // self._block_size)]),
            num_keys=num_keys,
            mask=self._mask(np.ones((last_row - first_row, num_keys), dtype=bool)),
        )

    def _group_bounds(self, window: int | None, lengths: np.ndarray) -> list[tuple[int, int]]:
        """Where to cut the single tokens, sorted roughly by length, into groups."""
        if self._limits is None:
            return [(0, len(lengths))] if len(lengths) else []
        seen = np.minimum(lengths, window) if window else lengths
        max_tokens = max(1, self._limits.max_group_bytes // self._token_bytes)
        bounds = []
        first = longest = num_tokens = 0
        for row, length in enumerate(seen.tolist()):
            longest = max(longest, length)
            num_read = longest * (row - first + 1)
            num_tokens += length
            is_padded = num_read - num_tokens > self._limits.max_padding_tokens
            if row > first and (is_padded or num_read > max_tokens):
                bounds.append((first, row))
                first, longest, num_tokens = row, length, length
        return [*bounds, (first, len(seen))] if len(seen) else []

    def _group(
        self,
        table: np.ndarray,
        window: int | None,
        slots: np.ndarray,
        lengths: np.ndarray,
        first_row: int,
    ) -> DecodeGroup:
        block_size = self._block_size
        oldest = np.maximum(0, lengths - window) if window else np.zeros_like(lengths)
        first_block = oldest // block_size
        last_block = (lengths - 1) // block_size
        steps = np.arange(int((last_block - first_block).max()) + 1)
        # A shorter sequence repeats its last block, where nothing but its own values can be.
        columns = np.minimum(first_block[:, None] + steps, last_block[:, None])
        begin = oldest - first_block * block_size  # among the gathered tokens of each sequence
        end = lengths - first_block * block_size
        keep = slice(int(begin.min()), int(end.max()))
        mask = None
        if begin.max() != keep.start or end.min() != keep.stop:
            token = np.arange(keep.start, keep.stop)
            mask = self._mask((token >= begin[:, None]) & (token < end[:, None]))[:, None, None]
        return DecodeGroup(
            start=first_row,
            stop=first_row + len(slots),
            blocks=self._tensor(table[slots[:, None], columns].reshape(-1)),
            keep=keep,
            mask=mask,
        )

    def _chunk(
        self, window: int | None, slot: int, start: int, first_row: int, last_row: int
    ) -> PromptChunk:
        stop = start + last_row - first_row
        oldest = max(0, start - window + 1) if window else 0
        first_block = oldest // self._block_size
        first_key = 0 if start == 0 else first_block * self._block_size
        mask = None
        if start > 0 or (window is not None and window < stop):
            behind = np.arange(start, stop)[:, None] - np.arange(first_key, stop)
            mask = self._mask((behind >= 0) & (behind < (window or stop)))
        blocks = self._table[slot, first_block : -(-stop // self._block_size)]
        return PromptChunk(
            start=first_row,
            stop=last_row,
            blocks=None if start == 0 else self._tensor(blocks),
            num_keys=stop - first_key,
            mask=mask,
        )

    def _mask(self, is_seen: np.ndarray) -> torch.Tensor:
        mask = np.where(is_seen, np.float32(0), np.float32("-inf"))
        return torch.from_numpy(mask).to(self._device, self._dtype)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
