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
    # Additive, [B, 1, 1, len(keep)], or with a bias by head [B, kv_heads, heads / kv_heads, len(keep)];
    # None if every token of `keep` is seen by all.
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows `start:stop` of one sequence, n in number."""

    start: int
    stop: int
    blocks: (
        torch.Tensor | None
    )  # [num_blocks] int64; None: nothing precedes the chunk, its own keys are enough
    num_keys: int  # of the gathered tokens, the rest of the last block is not yet written
    # Additive, [n, num_keys], or with a bias by head [heads / kv_heads, kv_heads, n, num_keys];
    # None is causal, with as many keys as queries.
    mask: torch.Tensor | None


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
    cross: AttentionView | None = None  # of the encoder's keys; None: the model has no encoder

    @property
    def only_decodes(self) -> bool:
        """Whether every row is the newest token of a sequence."""
        return not any(view.chunks for view in self.views.values())


@dataclass(frozen=True, slots=True)
class EncoderMetadata:
    """Encoder inputs of a step, laid end to end; each attends to all of itself and to nothing else.

    The keys and values that the decoder makes of them live in blocks of their own, beside those of
    the decoder's tokens:

        row      0 ........ 6 | 7 ...... 11          blocks of 4 tokens
                   input A    |   input B
        blocks    9 9 9 9 3 3 3 5 5 5 5 8            3 and 8 are entered: not filled to the end
    """

    bounds: tuple[tuple[int, int], ...]  # first row of each input, and the row after its last
    cache_rows: torch.Tensor  # [T] int64: where the decoder's keys and values of each token go
    entered_blocks: torch.Tensor | None  # [n] int64, or None
