"""Attention over the paged KV cache: the layer that a model holds, and the cache. Knows no model.

The cache of one layer, one row a token; keys and values of a token lie side by side, so that a step
writes both with one copy and reads both with one gather:

    rows [num_blocks, block_size, 2 * kv_heads, d]     block 7:  | k0 k1 v0 v1 |  <- its token 0
                                                                 | k0 k1 v0 v1 |  <- its token 1
    keys   = rows[:, :, :kv_heads]                                     ...
    values = rows[:, :, kv_heads:]     both [num_blocks, block_size, kv_heads, d], without a copy
"""

from dataclasses import dataclass

import torch
from torch import nn

from worker.kernels import sdpa
from worker.kernels.metadata import AttentionMetadata, EncoderMetadata


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values: a layer's are `[num_blocks, block_size, 2 * kv_heads, head_dim]`."""

    layers: tuple[torch.Tensor, ...]


class PagedAttention(nn.Module):
    """softmax(q kᵀ scale) v of every token over the earlier tokens of its sequence (and itself).

    `window` limits it to that many newest positions. Query heads share key-value heads in groups.
    """

    def __init__(self, layer_index: int, *, scale: float, window: int | None = None) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.scale = scale
        self.window = window

    def forward(
        self, q: torch.Tensor, kv: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Store `kv` in the cache, then attend. One opaque operator: a kernel may take its place.

        Args:
            q: `[T, heads, d]`.
            kv: `[T, 2 * kv_heads, d]`, the keys first.

        Returns:
            `[T, heads * d]`.
        """
        rows = cache.layers[self.layer_index]
        return sdpa.paged_attention(q, kv, rows, metadata, scale=self.scale, window=self.window)

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """The same, where `kv` is in the cache already."""
        rows = cache.layers[self.layer_index]
        return sdpa.attend(q, kv, rows, metadata, scale=self.scale, window=self.window)


class CrossAttention(nn.Module):
    """softmax(q kᵀ scale) v of every token of a decoder over its sequence's whole encoder input.

    The keys and values are stored once, when the encoder has run. They lie in the cache of the same
    layer as the decoder's own, in other blocks: one pool, one allocator.
    """

    def __init__(self, layer_index: int, *, scale: float) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.scale = scale

    def store(self, kv: torch.Tensor, cache: KvCache, metadata: EncoderMetadata) -> None:
        """Store `kv`, `[T, 2 * kv_heads, d]`, of the encoder's tokens."""
        sdpa.store(kv, cache.layers[self.layer_index], metadata)

    def forward(self, q: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        """Queries `[T, heads, d]` to `[T, heads * d]`."""
        rows = cache.layers[self.layer_index]
        return sdpa.cross_attention(q, rows, metadata, scale=self.scale)
