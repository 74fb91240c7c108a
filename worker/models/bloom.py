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
from worker.layers.attention import KvCache
from worker.layers.build import Build
from worker.layers.feed_forward import FeedForward
from worker.layers.norm import LayerNorm
from worker.models.config import DecoderConfig, multi_head_sizes, required
from worker.models.decoder import DecoderModel
from worker.models.self_attention import SelfAttention
from worker.weights.pieces import WeightNames, of_layers, of_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class BloomConfig(DecoderConfig):
    """Sizes and switches, before the model is divided among shards."""

    norm_eps: float
    has_normed_residual: bool  # x + f(x) with x after the norm, not before it
    is_head_tied: bool


class BloomModel(DecoderModel):
    """Decoder and head of one shard."""

    def __init__(self, config: BloomConfig, build: Build) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        super().__init__(config, build, block=Block, norm=norm)
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.alibi = Alibi(config.num_heads, build)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embedding_norm(self.embedding(tokens))

    def layer_inputs(
        self, positions: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> tuple[KvCache, AttentionMetadata]:
        return cache, with_distance_bias(metadata, positions, self.alibi, self.alibi.num_heads)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> BloomConfig:
        """A parsed config.json. Raises ConfigError."""
        return BloomConfig(
            **multi_head_sizes(
                hf,
                hidden_size=required(hf, "hidden_size", "n_embed"),
                num_layers=required(hf, "n_layer", "num_hidden_layers"),
                num_heads=required(hf, "n_head", "num_attention_heads"),
            ),
            max_positions=hf.get("seq_length") or 2048,  # ALiBi has no end; the training had
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            has_normed_residual=hf.get("apply_residual_connection_post_layernorm", False),
            is_head_tied=hf.get("tie_word_embeddings", True),
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
    """x + attention(norm(x)), then x + mlp(norm(x)). The masks of `metadata` hold the bias."""

    def __init__(self, config: BloomConfig, index: int, build: Build) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = LayerNorm(size, config.norm_eps, build)
        self.attention = SelfAttention(config, index, build, scale=config.head_dim**-0.5)
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
