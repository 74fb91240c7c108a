"""BLOOM and BLOOMZ (BigScience 2022).

- positions are an ALiBi bias on the attention scores; the embedding has none, so it has a LayerNorm
- pre-normalised residual blocks with LayerNorm; a config may take the residual after the norm
- multi-head attention; the files have q, k and v of each head side by side
- feed-forward network of four times the hidden size, with the tanh form of GELU
- biases everywhere but in the head, which is tied to the embedding

Shapes: T tokens, H hidden, V vocabulary, h heads, d features of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.kernels.bias import with_distance_bias
from worker.kernels.metadata import AttentionMetadata
from worker.layers.alibi import Alibi
from worker.layers.attention import KvCache, PagedAttention
from worker.layers.build import Build
from worker.layers.embedding import VocabularyEmbedding, VocabularyHead
from worker.layers.feed_forward import FeedForward
from worker.layers.linear import QkvLinear, RowLinear
from worker.layers.norm import LayerNorm
from worker.models.config import file_dtype, head_size, required, token_list
from worker.weights.pieces import WeightNames, of_layers, of_modules


@dataclass(frozen=True, slots=True)
class BloomConfig:
    """Sizes and switches, before the model is divided among shards."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    has_normed_residual: bool  # x + f(x) with x after the norm, not before it
    is_head_tied: bool
    dtype: str
    eos_tokens: tuple[int, ...]

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_layers


class BloomModel(nn.Module):
    """Decoder and head of one shard."""

    def __init__(self, config: BloomConfig, build: Build) -> None:
        super().__init__()
        self.embedding = VocabularyEmbedding(config.vocab_size, config.hidden_size, build)
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.alibi = Alibi(config.num_heads, build)
        self.layers = nn.ModuleList(
            Block(config, index, build) for index in range(config.num_layers)
        )
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.head = VocabularyHead(config.hidden_size, config.vocab_size, build)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Tokens and their positions, both `[T]`, to hidden states `[T, H]`; writes their keys and
        values."""
        metadata = with_distance_bias(metadata, positions, self.alibi, self.alibi.num_heads)
        x = self.embedding_norm(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, cache, metadata)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(hidden)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> BloomConfig:
        """A parsed config.json. Raises ConfigError."""
        hidden_size = required(hf, "hidden_size", "n_embed")
        num_heads = required(hf, "n_head", "num_attention_heads")
        return BloomConfig(
            architecture=required(hf, "architectures")[0],
            vocab_size=required(hf, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=required(hf, "n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            head_dim=head_size(hidden_size, num_heads),
            max_positions=hf.get("seq_length") or 2048,  # ALiBi has no end; the training had
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            has_normed_residual=hf.get("apply_residual_connection_post_layernorm", False),
            is_head_tied=hf.get("tie_word_embeddings", True),
            dtype=file_dtype(hf),
            eos_tokens=token_list(hf.get("eos_token_id")),
        )

    @staticmethod
    def weight_names(config: BloomConfig) -> WeightNames:
        """Where each tensor of a checkpoint belongs."""
        per_layer = of_modules(
            {
                "input_layernorm": "attention_norm",
                "self_attention.query_key_value": "attention.qkv:heads",
                "self_attention.dense": "attention.output",
                "post_attention_layernorm": "mlp_norm",
                "mlp.dense_h_to_4h": "mlp.up",
                "mlp.dense_4h_to_h": "mlp.down",
            }
        )
        return WeightNames(
            table={
                "transformer.word_embeddings.weight": "embedding.weight",
                **of_modules({"transformer.word_embeddings_layernorm": "embedding_norm"}),
                **of_layers(per_layer, "transformer.h.", config.num_layers),
                **of_modules({"transformer.ln_f": "norm"}),
                "lm_head.weight": "head.weight",
            },
            aliases={"lm_head.weight": "transformer.word_embeddings.weight"}
            if config.is_head_tied
            else {},
            prefix="transformer.",
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BloomConfig, index: int, build: Build) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = LayerNorm(size, config.norm_eps, build)
        self.attention = Attention(config, index, build)
        self.mlp_norm = LayerNorm(size, config.norm_eps, build)
        self.mlp = FeedForward(size, 4 * size, build, activation_name="gelu_pytorch_tanh")
        self.has_normed_residual = config.has_normed_residual

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        normed = self.attention_norm(x)
        residual = normed if self.has_normed_residual else x
        x = residual + self.attention(normed, cache, metadata)
        normed = self.mlp_norm(x)
        residual = normed if self.has_normed_residual else x
        return residual + self.mlp(normed)


class Attention(nn.Module):
    """Multi-head attention; the positions are in the masks of `metadata`."""

    def __init__(self, config: BloomConfig, index: int, build: Build) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=True,
        )
        self.paged = PagedAttention(index, scale=config.head_dim**-0.5)
        self.output = RowLinear(size, size, build, has_bias=True)

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, 3 h, d]: q, k, v
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        return self.output(self.paged(q, kv, cache, metadata))
