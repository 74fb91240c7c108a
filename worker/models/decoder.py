"""What the engine calls of a decoder-only model: tokens to hidden states, hidden states to logits.
The way through is the same in every family; it knows neither blocks nor positions.

    tokens ── embed ── block 0 ── block 1 ── ... ── norm ── hidden states ── head ── logits

Shapes: T tokens of all sequences of a step, laid end to end; H hidden, V vocabulary, E embedding
(H, but for one family).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from worker.kernels.metadata import AttentionMetadata
from worker.layers.attention import KvCache
from worker.layers.build import Build
from worker.layers.embedding import VocabularyEmbedding, VocabularyHead
from worker.models.config import DecoderConfig


class DecoderModel(nn.Module):
    """Decoder and head of one shard.

    A family gives its blocks and its last norm to `__init__`, and two static methods,
    `read_config(hf)`, which raises ConfigError, and `weight_names(config)`. How positions enter it
    says in `embed`, if they are part of a token's vector, or in `layer_inputs`, if every block
    needs them.

    Args:
        block: `(config, index, build)` to a module, which is called with `x` and `*layer_inputs`.
        norm: what follows the last block.
        embedding_size: E of embedding and head.
    """

    def __init__(
        self,
        config: DecoderConfig,
        build: Build,
        *,
        block: Callable[[Any, int, Build], nn.Module],
        norm: nn.Module,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        size = embedding_size or config.hidden_size
        self.embedding = VocabularyEmbedding(config.vocab_size, size, build)
        self.layers = nn.ModuleList(
            block(config, index, build) for index in range(config.num_layers)
        )
        self.norm = norm
        self.head = VocabularyHead(size, config.vocab_size, build)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Tokens and their positions, both `[T]`, to hidden states `[T, H]`; writes their keys and
        values."""
        x = self.embed(tokens, positions)
        return self.norm(self.run_layers(x, *self.layer_inputs(positions, cache, metadata)))

    def run_layers(self, x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """All blocks, `[T, H]` to `[T, H]`."""
        for layer in self.layers:
            x = layer(x, *inputs)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(hidden)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens and their positions, both `[T]`, to what the first block reads, `[T, H]`."""
        return self.embedding(tokens)

    def layer_inputs(
        self, positions: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> tuple[Any, ...]:
        """What every block is given besides `x`."""
        return cache, metadata
