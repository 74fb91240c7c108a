"""Attention of a decoder's block to its own sequence, as the families before Llama have it: q, k and
v in one product, then the paged cache, then the output projection. Knows no positions.

Shapes: T tokens, H hidden, h heads and kv_h key-value heads of this shard, d features of a head.
"""

import torch
from torch import nn

from worker.kernels.metadata import AttentionMetadata
from worker.layers.attention import KvCache, PagedAttention
from worker.layers.build import Build
from worker.layers.linear import QkvLinear, RowLinear
from worker.models.config import DecoderConfig


class SelfAttention(nn.Module):
    """`[T, H]` to `[T, H]`.

    `heads` and `attend` are its two halves, for who does something to the heads between them.

    Args:
        index: which layer's cache is read and written.
        scale: of the scores.
        has_bias: of both linears.
        is_transposed: as in `MergedColumnLinear`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        build: Build,
        *,
        scale: float,
        has_bias: bool = True,
        is_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=has_bias,
            is_transposed=is_transposed,
        )
        self.paged = PagedAttention(index, scale=scale)
        self.output = RowLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            build,
            has_bias=has_bias,
            is_transposed=is_transposed,
        )

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        return self.output(self.attend(self.heads(x), cache, metadata))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H]` to `[T, h + 2 kv_h, d]`: queries, keys, values."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim))

    def attend(
        self, heads: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`[T, h + 2 kv_h, d]` to what the output projection reads, `[T, h * d]`."""
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        return self.paged(q, kv, cache, metadata)
