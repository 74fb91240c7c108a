"""Attention over the paged KV cache: the layer that a model holds, and the cache. Knows no model.

The cache of one layer, one row a token; keys and values of a token lie side by side, so that a step
writes both with one copy and reads both with one gather:

    rows [num_blocks, block_size, 2 * kv_heads, head_dim]     block 7:  | k0 k1 v0 v1 |   <- token 0 of the block
                                                                        | k0 k1 v0 v1 |   <- token 1
    keys   = rows[:, :, :kv_heads]                                        ...
    values = rows[:, :, kv_heads:]     both [num_blocks, block_size, kv_heads, head_dim], without a copy
"""

from dataclasses import dataclass

import torch
from torch import nn

from worker.kernels import sdpa
from worker.kernels.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of every layer: `layers[i]` is `[num_blocks, block_size, 2 * kv_heads,
    head_dim]`."""

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
