"""GPT-BigCode: StarCoder (Li et al. 2023) and SantaCoder (Ben Allal et al. 2023).

- GPT-2 with multi-query attention: all query heads share one key-value head, which every shard has
- without multi-query, the files have q, k and v of each head side by side, not as GPT-2 has them
- the original SantaCoder, whose code came with it, is the same model in other files: q apart from k
  and v, and the weights of a block stored [inputs, outputs] (Conv1D)
- learned positions; pre-normalised residual blocks with LayerNorm
- biases everywhere but in the head, which is tied to the embedding

Shapes: T tokens, H hidden, V vocabulary, h heads, d features of a head.
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
from worker.layers.linear import QkvLinear, RowLinear
from worker.layers.norm import LayerNorm
from worker.models.config import ConfigError, file_dtype, head_size, required, token_list
from worker.weights.pieces import WeightNames, of_layers, of_modules

ORIGINAL_SANTACODER = "GPT2LMHeadCustomModel"


@dataclass(frozen=True, slots=True)
class GptBigCodeConfig:
    """Sizes and switches, before the model is divided among shards.

    Not here: the switches of attention in float32, which is how ours always rounds.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    scale: float  # of the attention scores
    is_head_tied: bool
    dtype: str
    eos_tokens: tuple[int, ...]

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_layers

    @property
    def is_multi_query(self) -> bool:
        return self.num_kv_heads != self.num_heads

    @property
    def is_original(self) -> bool:
        """Whether the files are laid out as SantaCoder's own code does it."""
        return self.architecture == ORIGINAL_SANTACODER


class GptBigCodeModel(nn.Module):
    """Decoder and head of one shard."""

    def __init__(self, config: GptBigCodeConfig, build: Build) -> None:
        super().__init__()
        self.embedding = VocabularyEmbedding(config.vocab_size, config.hidden_size, build)
        self.positions = LearnedPositions(config.max_positions, config.hidden_size, build)
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
        x = self.embedding(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, cache, metadata)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(hidden)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> GptBigCodeConfig:
        """A parsed config.json. Raises ConfigError."""
        if hf.get("add_cross_attention"):
            raise ConfigError(
                "`add_cross_attention` must be false: there is no encoder to attend to"
            )
        architecture = required(hf, "architectures")[0]
        hidden_size = required(hf, "n_embd", "hidden_size")
        num_heads = required(hf, "n_head", "num_attention_heads")
        head_dim = head_size(hidden_size, num_heads)
        return GptBigCodeConfig(
            architecture=architecture,
            vocab_size=required(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=hf.get("n_inner") or 4 * hidden_size,
            num_layers=required(hf, "n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=1 if _is_multi_query(hf, architecture) else num_heads,
            head_dim=head_dim,
            max_positions=required(hf, "n_positions", "max_position_embeddings"),
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            activation=hf.get("activation_function", "gelu_pytorch_tanh"),
            scale=head_dim**-0.5 if hf.get("scale_attn_weights", True) else 1.0,
            is_head_tied=hf.get("tie_word_embeddings", True),
            dtype=file_dtype(hf),
            eos_tokens=token_list(hf.get("eos_token_id")),
        )

    @staticmethod
    def weight_names(config: GptBigCodeConfig) -> WeightNames:
        """Where each tensor of a checkpoint belongs."""
        if config.is_original:
            qkv = {"attn.q_attn": "attention.qkv:q", "attn.kv_attn": "attention.qkv:kv"}
        else:
            fused = "qkv" if config.is_multi_query else "heads"
            qkv = {"attn.c_attn": f"attention.qkv:{fused}"}
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GptBigCodeConfig, index: int, build: Build) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.attention = Attention(config, index, build)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            build,
            activation_name=config.activation,
            is_transposed=config.is_original,
        )

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cache, metadata)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Multi-query attention, or multi-head."""

    def __init__(self, config: GptBigCodeConfig, index: int, build: Build) -> None:
        super().__init__()
        size, is_transposed = config.hidden_size, config.is_original
        self.head_dim = config.head_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=True,
            is_transposed=is_transposed,
        )
        self.paged = PagedAttention(index, scale=config.scale)
        self.output = RowLinear(size, size, build, has_bias=True, is_transposed=is_transposed)

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, h + 2 kv_h, d]: q, k, v
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        return self.output(self.paged(q, kv, cache, metadata))


def _is_multi_query(hf: Mapping[str, Any], architecture: str) -> bool:
    if architecture != ORIGINAL_SANTACODER:
        return bool(hf.get("multi_query", True))
    kind = hf.get("attention_head_type", "multiquery")
    if kind != "multiquery":
        raise ConfigError(f"`attention_head_type` must be 'multiquery'. Given: {kind!r}")
    return True
