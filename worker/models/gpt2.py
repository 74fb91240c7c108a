"""GPT-2 (Radford et al. 2019).

- learned positions
- pre-normalised residual blocks with LayerNorm
- multi-head attention; the files have q, k and v as one tensor, whose weights, as all of a block,
  are stored [inputs, outputs] (Conv1D)
- some configs scale the scores of layer i by 1 / (i + 1), or not by the head size
- biases everywhere but in the head, which is tied to the embedding

Shapes: T tokens, H hidden, V vocabulary, h heads, d features of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.kernels.metadata import AttentionMetadata
from worker.layers.attention import KvCache
from worker.layers.build import Build
from worker.layers.embedding import LearnedPositions
from worker.layers.feed_forward import FeedForward
from worker.layers.norm import LayerNorm
from worker.models.config import ConfigError, DecoderConfig, multi_head_sizes, required
from worker.models.decoder import DecoderModel
from worker.models.self_attention import SelfAttention
from worker.weights.pieces import WeightNames, of_layers, of_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """Sizes and switches, before the model is divided among shards.

    Not here: `reorder_and_upcast_attn` and its like, which is how our attention always rounds.
    """

    intermediate_size: int
    norm_eps: float
    activation: str
    scales: tuple[float, ...]  # of the attention scores, a layer each
    is_transposed: bool  # the files have a block's weights as [inputs, outputs]
    is_head_tied: bool


class Gpt2Model(DecoderModel):
    """Decoder and head of one shard."""

    def __init__(self, config: Gpt2Config, build: Build) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        super().__init__(config, build, block=Block, norm=norm)
        self.positions = LearnedPositions(config.max_positions, config.hidden_size, build)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) + self.positions(positions)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> Gpt2Config:
        """A parsed config.json. Raises ConfigError."""
        if hf.get("add_cross_attention"):
            raise ConfigError(
                "`add_cross_attention` must be false: there is no encoder to attend to"
            )
        sizes = multi_head_sizes(
            hf,
            hidden_size=required(hf, "n_embd", "hidden_size"),
            num_layers=required(hf, "n_layer", "num_hidden_layers"),
            num_heads=required(hf, "n_head", "num_attention_heads"),
        )
        scale = sizes["head_dim"] ** -0.5 if hf.get("scale_attn_weights", True) else 1.0
        is_falling = hf.get("scale_attn_by_inverse_layer_idx", False)
        return Gpt2Config(
            **sizes,
            max_positions=required(hf, "n_positions", "max_position_embeddings"),
            intermediate_size=hf.get("n_inner") or 4 * sizes["hidden_size"],
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            activation=hf.get("activation_function", "gelu_new"),
            scales=tuple(
                scale / (layer + 1) if is_falling else scale for layer in range(sizes["num_layers"])
            ),
            is_transposed=True,
            is_head_tied=hf.get("tie_word_embeddings", True),
        )

    @staticmethod
    def weight_names(config: Gpt2Config) -> WeightNames:
        """Where each tensor of a checkpoint belongs; the table is at the end of this file."""
        return gpt2_names(config, {"attn.c_attn": "attention.qkv:qkv"})


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Gpt2Config, index: int, build: Build) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.attention = SelfAttention(
            config,
            index,
            build,
            scale=config.scales[index],
            is_transposed=config.is_transposed,
        )
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            build,
            activation_name=config.activation,
            is_transposed=config.is_transposed,
        )

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cache, metadata)
        return x + self.mlp(self.mlp_norm(x))


def gpt2_names(config: Gpt2Config, qkv: Mapping[str, str]) -> WeightNames:
    """The names of GPT-2 and of what came of it; `qkv` are the modules for q, k and v of a layer."""
    per_layer = of_modules(
        {
            "ln_1": "attention_norm",
            **qkv,
            "attn.c_proj": "attention.output",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        }
    )
    return WeightNames(
        table={
            "transformer.wte.weight": "embedding.weight",
            "transformer.wpe.weight": "positions.weight",
            **of_layers(per_layer, "transformer.h.", config.num_layers),
            **of_modules({"transformer.ln_f": "norm"}),
            "lm_head.weight": "head.weight",
        },
        aliases={"lm_head.weight": "transformer.wte.weight"} if config.is_head_tied else {},
        ignored=(".attn.bias", ".attn.masked_bias"),  # masks
        prefix="transformer.",
    )
