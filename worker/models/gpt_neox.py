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
from worker.layers.attention import KvCache
from worker.layers.build import Build
from worker.layers.feed_forward import FeedForward
from worker.layers.norm import LayerNorm
from worker.layers.rotary import RopeConfig, RotaryEmbedding, Rotation
from worker.models.config import (
    ConfigError,
    DecoderConfig,
    multi_head_sizes,
    partial_rotary_factor,
    required,
    rope_config,
    stretched_positions,
)
from worker.models.decoder import DecoderModel
from worker.models.self_attention import SelfAttention
from worker.weights.pieces import WeightNames, of_layers, of_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class GptNeoxConfig(DecoderConfig):
    """Sizes and switches, before the model is divided among shards."""

    intermediate_size: int
    rotary_dim: int
    rope: RopeConfig
    norm_eps: float
    activation: str
    is_parallel: bool  # attention and feed-forward network read the same x
    has_attention_bias: bool
    is_head_tied: bool


class GptNeoxModel(DecoderModel):
    """Decoder and head of one shard."""

    def __init__(self, config: GptNeoxConfig, build: Build) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        super().__init__(config, build, block=Block, norm=norm)
        self.rotary = RotaryEmbedding(
            config.rope, config.rotary_dim, dtype=build.dtype, device=build.device
        )

    def layer_inputs(
        self, positions: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> tuple[Rotation, KvCache, AttentionMetadata]:
        return self.rotary(positions), cache, metadata

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> GptNeoxConfig:
        """A parsed config.json. Raises ConfigError."""
        sizes = multi_head_sizes(
            hf,
            hidden_size=required(hf, "hidden_size"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=required(hf, "num_attention_heads"),
        )
        rotary_share = partial_rotary_factor(hf, hf.get("rotary_pct", 0.25))
        max_positions = hf.get("max_position_embeddings") or 2048
        rope = rope_config({"rope_theta": hf.get("rotary_emb_base"), **hf}, max_positions)
        return GptNeoxConfig(
            **sizes,
            max_positions=max_positions,
            max_stretched_positions=stretched_positions(rope, max_positions),
            intermediate_size=required(hf, "intermediate_size"),
            rotary_dim=_rotary_dim(sizes["head_dim"], rotary_share),
            rope=rope,
            norm_eps=hf.get("layer_norm_eps", 1e-5),
            activation=hf.get("hidden_act", "gelu"),
            is_parallel=hf.get("use_parallel_residual", True),
            has_attention_bias=hf.get("attention_bias", True),
            is_head_tied=hf.get("tie_word_embeddings", False),
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
        self.attention = SelfAttention(
            config, index, build, scale=config.head_dim**-0.5, has_bias=config.has_attention_bias
        )
        self.rotary_dim = config.rotary_dim
        self.mlp_norm = LayerNorm(size, config.norm_eps, build)
        self.mlp = FeedForward(
            size, config.intermediate_size, build, activation_name=config.activation
        )

    def forward(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        attended = self._attended(self.attention_norm(x), rotation, cache, metadata)
        if self.is_parallel:
            return x + self.shard.all_reduce(attended + self.mlp.partial(self.mlp_norm(x)))
        x = x + self.shard.all_reduce(attended)
        return x + self.mlp(self.mlp_norm(x))

    def _attended(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """This shard's summand of the attention's result."""
        attention = self.attention
        heads = attention.heads(x)
        rotation.apply_(heads[:, : 2 * attention.num_heads, : self.rotary_dim])  # queries, keys
        return attention.output.partial(attention.attend(heads, cache, metadata))


def _rotary_dim(head_dim: int, share: float) -> int:
    size = int(head_dim * share)
    if size % 2 or not size:
        raise ConfigError(
            "`rotary_pct` of the head size must be an even number of features. "
            f"Given: {share} of {head_dim}"
        )
    return size
