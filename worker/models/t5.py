"""T5, and its relatives T5 v1.1, FLAN-T5, mT5 and MT0: encoder and decoder.

- pre-normalised residual blocks with RMSNorm; no biases anywhere, and scores are not scaled
- positions are a learned bias on the scores, by distance, the same in all layers of a stack; none
  in cross attention. The encoder sees both directions
- heads * head size is independent of the hidden size
- MLP: wo(relu(wi)) in T5, wo(gelu(wi_0) * wi_1) since v1.1; `wo` overflows in float16 and runs in
  float32 there, and with it the residual stream
- T5 scales the last hidden state by 1/sqrt(H), as its head is the embedding; v1.1 has its own head

The encoder runs once for a sequence, over its whole input; each decoder layer then stores the keys
and values of its cross attention in the KV cache. After that the decoder runs as any other model.
Shapes: T tokens of all sequences of a step, laid end to end; H hidden, V vocabulary, h heads, d
features of a head, L tokens of the longest encoder input.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from worker.kernels import sdpa
from worker.kernels.bias import with_distance_bias
from worker.kernels.metadata import AttentionMetadata, EncoderMetadata
from worker.layers.activations import activation, gated
from worker.layers.attention import CrossAttention, KvCache
from worker.layers.bucketed_bias import BucketedBias
from worker.layers.build import Build
from worker.layers.embedding import VocabularyEmbedding, VocabularyHead
from worker.layers.linear import ColumnLinear, MergedColumnLinear, QkvLinear, RowLinear
from worker.layers.norm import RmsNorm
from worker.models.self_attention import SelfAttention
from worker.models.t5_config import T5Config
from worker.weights.pieces import WeightNames

_SCALE = 1.0  # of scores: none


class T5Model(nn.Module):
    """Encoder, decoder and head of one shard."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        self.decoder_start_token = config.decoder_start_token
        self.output_scale = config.hidden_size**-0.5 if config.has_scaled_output else 1.0
        self.embedding = VocabularyEmbedding(config.vocab_size, config.hidden_size, build)
        self.encoder = Encoder(config, build)
        self.decoder = Decoder(config, build)
        self.head = VocabularyHead(config.hidden_size, config.vocab_size, build)

    def encode(self, tokens: torch.Tensor, cache: KvCache, metadata: EncoderMetadata) -> None:
        """Run whole inputs `[T]`, and store what the decoder's layers will attend to of them."""
        encoded = self.encoder(self.embedding(tokens), metadata)
        for layer in self.decoder.layers:
            layer.cross_attention.store(encoded, cache, metadata)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Tokens of the decoder and their positions, both `[T]`, to hidden states `[T, H]`; writes
        their keys and values."""
        x = self.decoder(self.embedding(tokens), positions, cache, metadata)
        return x * self.output_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(hidden)

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> T5Config:
        """A parsed config.json. Raises ConfigError."""
        return T5Config.from_hf(hf)

    @staticmethod
    def weight_names(config: T5Config) -> WeightNames:
        """Where each tensor of a checkpoint belongs; the table is at the end of this file."""
        return _weight_names(config)


class Encoder(nn.Module):
    """The stack that reads an input, both ways."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        self.bias = _bias(config, build, is_bidirectional=True)
        self.layers = nn.ModuleList(
            EncoderBlock(config, build) for _ in range(config.num_encoder_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, build)

    def forward(self, x: torch.Tensor, metadata: EncoderMetadata) -> torch.Tensor:
        """`[T, H]` to `[T, H]`."""
        longest = max(stop - start for start, stop in metadata.bounds)
        position = torch.arange(longest, device=x.device)
        bias = self.bias(position[:, None] - position)  # [h, L, L]
        for layer in self.layers:
            x = layer(x, bias, metadata)
        return self.norm(x)


class Decoder(nn.Module):
    """The stack that writes an answer."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        self.bias = _bias(config, build, is_bidirectional=False)
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.layers = nn.ModuleList(
            DecoderBlock(config, index, build) for index in range(config.num_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, build)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`[T, H]` to `[T, H]`."""
        metadata = with_distance_bias(metadata, positions, self.bias, self.num_heads)
        for layer in self.layers:
            x = layer(x, cache, metadata)
        return self.norm(x)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.attention = EncoderAttention(config, build)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = Mlp(config, build)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, metadata: EncoderMetadata
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), bias, metadata)
        return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nn.Module):
    """As an encoder's block, with attention to the encoder's output between the two. The metadata's
    masks hold the bias."""

    def __init__(self, config: T5Config, index: int, build: Build) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.attention = SelfAttention(config, index, build, scale=_SCALE, has_bias=False)
        self.cross_attention_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.cross_attention = DecoderCrossAttention(config, index, build)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = Mlp(config, build)

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cache, metadata)
        x = x + self.cross_attention(self.cross_attention_norm(x), cache, metadata)
        return x + self.mlp(self.mlp_norm(x))


class EncoderAttention(nn.Module):
    """Attention of every token to its whole input."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.qkv = QkvLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            build=build,
        )
        self.output = _output(config, build)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, metadata: EncoderMetadata
    ) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, 3 h, d]
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        return self.output(sdpa.encoder_attention(q, kv, metadata, scale=_SCALE, bias=bias))


class DecoderCrossAttention(nn.Module):
    """Attention of the decoder to the encoder's output, whose keys and values are stored once."""

    def __init__(self, config: T5Config, index: int, build: Build) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        size = config.num_heads * config.head_dim
        self.q = ColumnLinear(config.hidden_size, size, build)
        self.kv = MergedColumnLinear(config.hidden_size, [("k", size), ("v", size)], build)
        self.cross = CrossAttention(index, scale=_SCALE)
        self.output = _output(config, build)

    def store(self, encoded: torch.Tensor, cache: KvCache, metadata: EncoderMetadata) -> None:
        """Store this layer's keys and values of the encoder's output `[T, H]`."""
        kv = self.kv(encoded).unflatten(-1, (-1, self.head_dim))
        self.cross.store(kv, cache, metadata)

    def forward(self, x: torch.Tensor, cache: KvCache, metadata: AttentionMetadata) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        return self.output(self.cross(q, cache, metadata))


class Mlp(nn.Module):
    """wo(act(wi(x))), or wo(act(wi_0(x)) * wi_1(x)). With float16 weights the result is float32."""

    def __init__(self, config: T5Config, build: Build) -> None:
        super().__init__()
        size = config.intermediate_size
        parts = [("gate", size), ("up", size)] if config.is_gated else [("", size)]
        self.inner = MergedColumnLinear(config.hidden_size, parts, build)
        self.output_dtype = torch.float32 if build.dtype == torch.float16 else build.dtype
        self.output = RowLinear(size, config.hidden_size, replace(build, dtype=self.output_dtype))
        self.is_gated = config.is_gated
        self.activation = activation(config.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x)
        inner = gated(inner, self.activation) if self.is_gated else self.activation(inner)
        return self.output(inner.to(self.output_dtype))


def _bias(config: T5Config, build: Build, *, is_bidirectional: bool) -> BucketedBias:
    return BucketedBias(
        config.num_buckets,
        config.max_distance,
        config.num_heads,
        build,
        is_bidirectional=is_bidirectional,
    )


def _output(config: T5Config, build: Build) -> RowLinear:
    return RowLinear(config.num_heads * config.head_dim, config.hidden_size, build)


def _weight_names(config: T5Config) -> WeightNames:
    table = {"shared.weight": "embedding.weight", "lm_head.weight": "head.weight"}
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_layers}
    for stack, num_layers in depths.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[bias] = f"{stack}.bias.weight"
        table[f"{stack}.final_layer_norm.weight"] = f"{stack}.norm.weight"
        for layer in range(num_layers):
            for name, target in _layer_names(config, has_cross=stack == "decoder").items():
                table[f"{stack}.block.{layer}.layer.{name}.weight"] = (
                    f"{stack}.layers.{layer}.{target}"
                )
    return WeightNames(
        table,
        aliases={"lm_head.weight": "shared.weight"},
        ignored=("EncDecAttention.relative_attention_bias.weight",),
        renamed={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
    )


def _layer_names(config: T5Config, *, has_cross: bool) -> dict[str, str]:
    """Of one block: the names in the files lack their `.weight`."""
    names = {f"0.SelfAttention.{part}": f"attention.qkv.weight:{part}" for part in "qkv"}
    names |= {
        "0.SelfAttention.o": "attention.output.weight",
        "0.layer_norm": "attention_norm.weight",
    }
    if has_cross:
        names |= {
            "1.EncDecAttention.q": "cross_attention.q.weight",
            "1.EncDecAttention.k": "cross_attention.kv.weight:k",
            "1.EncDecAttention.v": "cross_attention.kv.weight:v",
            "1.EncDecAttention.o": "cross_attention.output.weight",
            "1.layer_norm": "cross_attention_norm.weight",
        }
    mlp = 2 if has_cross else 1
    names |= {
        f"{mlp}.DenseReluDense.wo": "mlp.output.weight",
        f"{mlp}.layer_norm": "mlp_norm.weight",
    }
    inner = {"wi_0": ":gate", "wi_1": ":up"} if config.is_gated else {"wi": ""}
    return names | {
        f"{mlp}.DenseReluDense.{part}": f"mlp.inner.weight{piece}" for part, piece in inner.items()
    }
