"""Which rows of a step attend to which blocks of the KV cache. Made once a step, used by every
layer.

Rows are the tokens of a step. Rows that are alone in their sequence come first (decoding),
sequences of similar length beside each other; then come the chunks of several tokens (prompts):

    row      0 1 2 | 3 4 5 6 7 | 8 ........ 19 | 20 ... 27
             group |   group   |    chunk      |  chunk
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows `start:stop`, each the newest token of a sequence, B in number; each reads the same
    number of blocks.

    The gathered tokens of a sequence are N = blocks * block_size; only `keep` of them are looked
    at, and the mask hides those that a shorter sequence does not have.
    """

    start: int
    stop: int
    blocks: torch.Tensor  # [B * num_blocks] int64
    keep: slice
    mask: (
        torch.Tensor | None
    )  # [B, 1, 1, len(keep)] additive, None if every token of `keep` is seen by all


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows `start:stop` of one sequence, n in number."""

    start: int
    stop: int
    blocks: (
        torch.Tensor | None
    )  # [num_blocks] int64; None: nothing precedes the chunk, its own keys are enough
    num_keys: int  # of the gathered tokens, the rest of the last block is not yet written
    mask: (
        torch.Tensor | None
    )  # [n, num_keys] additive; None is causal, with as many keys as queries


@dataclass(frozen=True, slots=True)
class AttentionView:
    """What layers of one window see."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """All index tensors of a step."""

    cache_rows: (
        torch.Tensor
    )  # [T] int64: where each token's keys and values go, counted in tokens from block 0
    entered_blocks: (
        torch.Tensor | None
    )  # [n] int64: begun in this step and not filled by it, or None
    views: Mapping[int | None, AttentionView]  # by window; None is no window
