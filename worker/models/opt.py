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
from worker.layers.attention import KvCache, PagedAttention
from worker.layers.build import Build
from worker.layers.embedding import LearnedPositions, VocabularyEmbedding, VocabularyHead
from worker.layers.feed_forward import FeedForward
from worker.layers.linear import QkvLinear, ReplicatedLinear, RowLinear
from worker.layers.norm import LayerNorm
from worker.models.config import file_dtype, head_size, required, token_list
from worker.weights.pieces import WeightNames, of_layers, of_modules

NORM_EPS = 1e-5
POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True)
class OptConfig:
    """Sizes and switches, before the model is divided among shards."""

    architecture: str
    vocab_size: int
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_positions: int
    activation: str
    is_norm_first: bool
    has_final_norm: bool
    has_bias: bool
    has_norm_weights: bool
    is_head_tied: bool
    dtype: str
    eos_tokens: tuple[int, ...]

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_layers

    @property
    def has_projections(self) -> bool:
        return self.embedding_size != self.hidden_size


class OptModel(nn.Module):
    """Decoder and head of one shard."""

    def __init__(self, config: OptConfig, build: Build) -> None:
        super().__init__()
        hidden_size, embedding_size = config.hidden_size, config.embedding_size
        self.embedding = VocabularyEmbedding(config.vocab_size, embedding_size, build)
        self.positions = LearnedPositions(
            config.max_positions, hidden_size, build, offset=POSITION_OFFSET
        )
        self.project_in = self.project_out = nn.Identity()
        if config.has_projections:
            self.project_in = ReplicatedLinear(embedding_size, hidden_size, build)
            self.project_out = ReplicatedLinear(hidden_size, embedding_size, build)
        self.layers = nn.ModuleList(
            Block(config, index, build) for index in range(config.num_layers)
        )
        self.norm = _norm(config, build) if config.has_final_norm else nn.Identity()
        self.head = VocabularyHead(embedding_size, config.vocab_size, build)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Tokens and their positions, both `[T]`, to hidden states `[T, E]`; writes their keys and
        values."""
        x = self.project_in(self.embedding(tokens)) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, cache, metadata)
        return self.project_out(self.norm(x))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, E]` to logits `[n, V]`."""
        return self.head(hidden)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> OptConfig:
        """A parsed config.json. Raises ConfigError."""
        hidden_size = required(hf, "hidden_size")
        num_heads = required(hf, "num_attention_heads")
        is_norm_first = hf.get("do_layer_norm_before", True)
        return OptConfig(
            architecture=required(hf, "architectures")[0],
            vocab_size=required(hf, "vocab_size"),
            hidden_size=hidden_size,
            embedding_size=hf.get("word_embed_proj_dim") or hidden_size,
            intermediate_size=required(hf, "ffn_dim"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=num_heads,
            head_dim=head_size(hidden_size, num_heads),
            max_positions=hf.get("max_position_embeddings") or 2048,
            activation=hf.get("activation_function", "relu"),
            is_norm_first=is_norm_first,
            has_final_norm=is_norm_first and not hf.get("_remove_final_layer_norm", False),
            has_bias=hf.get("enable_bias", True),
            has_norm_weights=hf.get("layer_norm_elementwise_affine", True),
            is_head_tied=hf.get("tie_word_embeddings", True),
            dtype=file_dtype(hf),
            eos_tokens=token_list(hf.get("eos_token_id")),
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
        self.attention = Attention(config, index, build)
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


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: OptConfig, index: int, build: Build) -> None:
        super().__init__()
        size, has_bias = config.hidden_size, config.has_bias
        self.head_dim = config.head_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=has_bias,
        )
        self.q_scale = config.head_dim**-0.5
        self.paged = PagedAttention(index, scale=1.0)
        self.output = RowLinear(size, size, build, has_bias=has_bias)

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, 3 h, d]: q, k, v
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        # Here and not in the kernel, as it was trained in 16 bits: the scaled q is rounded.
        q.mul_(self.q_scale)
        return self.output(self.paged(q, kv, cache, metadata))


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
