"""OPT (Zhang et al. 2022), and Galactica (Taylor et al. 2022), which has its shape.

- learned positions, in a table whose first two rows belong to none
- residual blocks with LayerNorm before each part, or after its residual (OPT 350m)
- multi-head attention; feed-forward network with ReLU (OPT) or GELU (Galactica)
- biases everywhere but in the head, or nowhere but in the norms (`enable_bias`)
- embedding and tied head may be narrower than the blocks (OPT 350m), with projections between

Shapes: T tokens, H hidden, E embedding, V vocabulary, h heads, d features of a head.
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
from worker.layers.linear import ReplicatedLinear
from worker.layers.norm import LayerNorm
from worker.models.config import DecoderConfig, multi_head_sizes, required
from worker.models.decoder import DecoderModel
from worker.models.self_attention import SelfAttention
from worker.weights.pieces import WeightNames, of_layers, of_modules

NORM_EPS = 1e-5
POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OptConfig(DecoderConfig):
    """Sizes and switches, before the model is divided among shards."""

    embedding_size: int
    intermediate_size: int
    activation: str
    is_norm_first: bool
    has_final_norm: bool
    has_bias: bool
    has_norm_weights: bool
    is_head_tied: bool

    @property
    def has_projections(self) -> bool:
        return self.embedding_size != self.hidden_size


class OptModel(DecoderModel):
    """Decoder and head of one shard."""

    def __init__(self, config: OptConfig, build: Build) -> None:
        hidden_size, embedding_size = config.hidden_size, config.embedding_size
        norm = _norm(config, build) if config.has_final_norm else nn.Identity()
        super().__init__(config, build, block=Block, norm=norm, embedding_size=embedding_size)
        self.positions = LearnedPositions(
            config.max_positions, hidden_size, build, offset=POSITION_OFFSET
        )
        self.project_in = self.project_out = nn.Identity()
        if config.has_projections:
            self.project_in = ReplicatedLinear(embedding_size, hidden_size, build)
            self.project_out = ReplicatedLinear(hidden_size, embedding_size, build)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.project_in(self.embedding(tokens)) + self.positions(positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`, by way of `[n, E]`."""
        return self.head(self.project_out(hidden))

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> OptConfig:
        """A parsed config.json. Raises ConfigError."""
        sizes = multi_head_sizes(
            hf,
            hidden_size=required(hf, "hidden_size"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=required(hf, "num_attention_heads"),
        )
        is_norm_first = hf.get("do_layer_norm_before", True)
        return OptConfig(
            **sizes,
            max_positions=hf.get("max_position_embeddings") or 2048,
            embedding_size=hf.get("word_embed_proj_dim") or sizes["hidden_size"],
            intermediate_size=required(hf, "ffn_dim"),
            activation=hf.get("activation_function", "relu"),
            is_norm_first=is_norm_first,
            has_final_norm=is_norm_first and not hf.get("_remove_final_layer_norm", False),
            has_bias=hf.get("enable_bias", True),
            has_norm_weights=hf.get("layer_norm_elementwise_affine", True),
            is_head_tied=hf.get("tie_word_embeddings", True),
        )

    @staticmethod
    def weight_names(config: OptConfig) -> WeightNames:
        """Where each tensor of a checkpoint belongs; the table is at the end of this file."""
        return _weight_names(config)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or norm(x + attention(x)), norm(x + mlp(x))."""

    def __init__(self, config: OptConfig, index: int, build: Build) -> None:
        super().__init__()
        self.is_norm_first = config.is_norm_first
        self.attention_norm = _norm(config, build)
        self.attention = Attention(config, index, build, scale=1.0, has_bias=config.has_bias)
        self.mlp_norm = _norm(config, build)
        self.mlp = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            build,
            activation_name=config.activation,
            has_bias=config.has_bias,
        )

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        if self.is_norm_first:
            x = x + self.attention(self.attention_norm(x), cache, metadata)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, cache, metadata))
        return self.mlp_norm(x + self.mlp(x))


class Attention(SelfAttention):
    """Multi-head attention that scales the queries instead of the scores."""

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        heads = super().heads(x)
        # Here and not in the kernel, as it was trained in 16 bits: the scaled q is rounded.
        heads[:, : self.num_heads].mul_(self.head_dim**-0.5)
        return heads


def _norm(config: OptConfig, build: Build) -> LayerNorm:
    return LayerNorm(config.hidden_size, NORM_EPS, build, has_weights=config.has_norm_weights)


def _weight_names(config: OptConfig) -> WeightNames:
    products = {
        **{f"self_attn.{part}_proj": f"attention.qkv:{part}" for part in "qkv"},
        "self_attn.out_proj": "attention.output",
        "fc1": "mlp.up",
        "fc2": "mlp.down",
    }
    per_layer = of_modules(products, has_bias=config.has_bias)
    norms = {}
    if config.has_norm_weights:
        per_layer |= of_modules(
            {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "mlp_norm"}
        )
        if config.has_final_norm:
            norms = of_modules({"model.decoder.final_layer_norm": "norm"})
    projections = {}
    if config.has_projections:
        projections = {
            f"model.decoder.{name}.weight": f"{name}.weight"
            for name in ("project_in", "project_out")
        }
    embedding = "model.decoder.embed_tokens.weight"
    return WeightNames(
        table={
            embedding: "embedding.weight",
            "model.decoder.embed_positions.weight": "positions.weight",
            **projections,
            **of_layers(per_layer, "model.decoder.layers.", config.num_layers),
            **norms,
            "lm_head.weight": "head.weight",
        },
        aliases={"lm_head.weight": embedding} if config.is_head_tied else {},
        prefix="model.",
    )
