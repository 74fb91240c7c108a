"""GPT-NeoX (Black et al. 2022) and Pythia.

- rotary positions on the first features of each head only (a quarter, as a rule)
- residual blocks with LayerNorm, in parallel: x + attention(norm(x)) + mlp(norm'(x)), so shards sum
  once a layer; or one after the other, as a config may say
- multi-head attention; the files have q, k and v of each head side by side
- biases everywhere but in the head, which is not tied; the files call it `embed_out`
- the vocabulary is padded, so logits have more columns than the tokenizer has tokens

Shapes: T tokens, H hidden, V vocabulary, h heads, d features of a head, r of them rotary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.kernels.metadata import AttentionMetadata
from worker.layers.attention import KvCache, PagedAttention
from worker.layers.build import Build
from worker.layers.embedding import VocabularyEmbedding, VocabularyHead
from worker.layers.feed_forward import FeedForward
from worker.layers.linear import QkvLinear, RowLinear
from worker.layers.norm import LayerNorm
from worker.layers.rotary import RopeConfig, RotaryEmbedding, Rotation
from worker.models.config import (
    ConfigError,
    file_dtype,
    head_size,
    partial_rotary_factor,
    required,
    rope_config,
    token_list,
)
from worker.weights.pieces import WeightNames, of_layers, of_modules


@dataclass(frozen=True, slots=True)
class GptNeoxConfig:
    """Sizes and switches, before the model is divided among shards."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    rope: RopeConfig
    max_positions: int
    norm_eps: float
    activation: str
    is_parallel: bool  # attention and feed-forward network read the same x
    has_attention_bias: bool
    is_head_tied: bool
    dtype: str
    eos_tokens: tuple[int, ...]

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_layers


class GptNeoxModel(nn.Module):
    """Decoder and head of one shard."""

    def __init__(self, config: GptNeoxConfig, build: Build) -> None:
        super().__init__()
        self.embedding = VocabularyEmbedding(config.vocab_size, config.hidden_size, build)
        self.rotary = RotaryEmbedding(
            config.rope, config.rotary_dim, dtype=build.dtype, device=build.device
        )
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
        x = self.embedding(tokens)
        rotation = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, rotation, cache, metadata)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(hidden)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> GptNeoxConfig:
        """A parsed config.json. Raises ConfigError."""
        hidden_size = required(hf, "hidden_size")
        num_heads = required(hf, "num_attention_heads")
        max_positions = hf.get("max_position_embeddings") or 2048
        head_dim = head_size(hidden_size, num_heads)
        return GptNeoxConfig(
            architecture=required(hf, "architectures")[0],
            vocab_size=required(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(hf, "intermediate_size"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=num_heads,
            head_dim=head_dim,
            rotary_dim=_rotary_dim(head_dim, partial_rotary_factor(hf, hf.get("rotary_pct", 0.25))),
            rope=rope_config({"rope_theta": hf.get("rotary_emb_base"), **hf}, max_positions),
            max_positions=max_positions,
            norm_eps=hf.get("layer_norm_eps", 1e-5),
            activation=hf.get("hidden_act", "gelu"),
            is_parallel=hf.get("use_parallel_residual", True),
            has_attention_bias=hf.get("attention_bias", True),
            is_head_tied=hf.get("tie_word_embeddings", False),
            dtype=file_dtype(hf),
            eos_tokens=token_list(hf.get("eos_token_id")),
        )

    @staticmethod
    def weight_names(config: GptNeoxConfig) -> WeightNames:
        """Where each tensor of a checkpoint belongs."""
        attention = {
            "attention.query_key_value": "attention.qkv:heads",
            "attention.dense": "attention.output",
        }
        others = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "mlp_norm",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        }
        per_layer = of_modules(others) | of_modules(attention, has_bias=config.has_attention_bias)
        return WeightNames(
            table={
                "gpt_neox.embed_in.weight": "embedding.weight",
                **of_layers(per_layer, "gpt_neox.layers.", config.num_layers),
                **of_modules({"gpt_neox.final_layer_norm": "norm"}),
                "embed_out.weight": "head.weight",
            },
            aliases={"embed_out.weight": "gpt_neox.embed_in.weight"} if config.is_head_tied else {},
            ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
            prefix="gpt_neox.",
            renamed={"lm_head.weight": "embed_out.weight"},
        )


class Block(nn.Module):
    """Attention and feed-forward network, side by side or one after the other."""

    def __init__(self, config: GptNeoxConfig, index: int, build: Build) -> None:
        super().__init__()
        size = config.hidden_size
        self.shard = build.shard
        self.is_parallel = config.is_parallel
        self.attention_norm = LayerNorm(size, config.norm_eps, build)
        self.attention = Attention(config, index, build)
        self.mlp_norm = LayerNorm(size, config.norm_eps, build)
        self.mlp = FeedForward(
            size, config.intermediate_size, build, activation_name=config.activation
        )

    def forward(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        attended = self.attention.partial(self.attention_norm(x), rotation, cache, metadata)
        if self.is_parallel:
            return x + self.shard.all_reduce(attended + self.mlp.partial(self.mlp_norm(x)))
        x = x + self.shard.all_reduce(attended)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Multi-head attention with partly rotary heads."""

    def __init__(self, config: GptNeoxConfig, index: int, build: Build) -> None:
        super().__init__()
        size, has_bias = config.hidden_size, config.has_attention_bias
        self.head_dim = config.head_dim
        self.rotary_dim = config.rotary_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=has_bias,
        )
        self.paged = PagedAttention(index, scale=config.head_dim**-0.5)
        self.output = RowLinear(size, size, build, has_bias=has_bias)

    def partial(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """This shard's summand of the result."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, 3 h, d]: q, k, v
        rotation.apply_(heads[:, : 2 * self.num_heads, : self.rotary_dim])
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        return self.output.partial(self.paged(q, kv, cache, metadata))


def _rotary_dim(head_dim: int, share: float) -> int:
    size = int(head_dim * share)
    if size % 2 or not size:
        raise ConfigError(
            "`rotary_pct` of the head size must be an even number of features. "
            f"Given: {share} of {head_dim}"
        )
    return size
