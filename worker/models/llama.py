"""Llama, and its relatives Mistral, Qwen2, Qwen3 and SmolLM2.

- pre-normalised residual blocks with RMSNorm; no bias, except where a config says so (Qwen2: on q,
  k and v)
- rotary positions in every layer, plain or scaled (linear, dynamic, llama3, yarn)
- grouped-query attention: several query heads share a key-value head
- Qwen3 normalises each query and key head; Mistral, and some layers of some Qwens, see a sliding
  window
- gated MLP: silu(gate) * up

Shapes: T tokens of all sequences of a step, laid end to end; H hidden, V vocabulary, h heads, d
features of a head.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from worker.kernels.cpu.gated_block import GatedBlock, gated_block
from worker.kernels.cpu.gated_decoder import GatedDecoder, gated_decoder
from worker.kernels.metadata import AttentionMetadata
from worker.kernels.sdpa import clear_entered
from worker.layers.activations import activation, gated
from worker.layers.attention import KvCache, PagedAttention
from worker.layers.build import Build
from worker.layers.linear import MergedColumnLinear, QkvLinear, RowLinear, local_kv_heads
from worker.layers.norm import RmsNorm
from worker.layers.residual import added
from worker.layers.rotary import RotaryEmbedding, Rotation
from worker.models.config import ModelConfig
from worker.models.decoder import DecoderModel
from worker.weights.pieces import WeightNames


class LlamaModel(DecoderModel):
    """Decoder and head of one shard."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        super().__init__(config, build, block=Block, norm=norm)
        self.rotary = RotaryEmbedding(
            config.rope, config.head_dim, dtype=build.dtype, device=build.device
        )
        self._compiled: tuple[KvCache, GatedDecoder | None] | None = None

    def layer_inputs(
        self, positions: torch.Tensor, cache: KvCache, metadata: AttentionMetadata
    ) -> tuple[Rotation, KvCache, AttentionMetadata]:
        return self.rotary(positions), cache, metadata

    def run_layers(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        decoder = self._compiled_on(cache) if metadata.only_decodes else None
        if decoder is not None:
            return decoder(x, rotation.cos, rotation.sin, metadata)
        return super().run_layers(x, rotation, cache, metadata)

    def _compiled_on(self, cache: KvCache) -> GatedDecoder | None:
        """All layers for steps that only decode; None where a layer has parts that it has not."""
        if self._compiled is None or self._compiled[0] is not cache:
            layers = [layer.attention.paged for layer in self.layers]
            decoder = gated_decoder(
                [layer.compiled for layer in self.layers],
                windows=[layer.window for layer in layers],
                scales=[layer.scale for layer in layers],
                cache=cache.layers,
            )
            self._compiled = cache, decoder
        return self._compiled[1]

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """A parsed config.json. Raises ConfigError."""
        return ModelConfig.from_hf(hf)

    @staticmethod
    def weight_names(config: ModelConfig) -> WeightNames:
        """Where each tensor of a checkpoint belongs; the table is at the end of this file."""
        return _weight_names(config)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, build: Build) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.attention = Attention(config, index, build)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = Mlp(config, build)

    @cached_property
    def compiled(self) -> GatedBlock | None:
        """This block with less between its kernels, once the weights are there; None where it has
        parts that those kernels have not."""
        attention, mlp = self.attention, self.mlp
        if mlp.activation is not F.silu or attention.output.shard.size > 1:
            return None
        norms = [self.attention_norm, self.mlp_norm]
        if attention.has_qk_norm:
            norms += attention.q_norm, attention.k_norm
        return gated_block(
            [(norm.weight, norm.eps) for norm in norms],
            [part.product for part in (attention.qkv, attention.output, mlp.gate_up, mlp.down)],
            (attention.num_heads, attention.num_kv_heads, attention.head_dim),
        )

    def forward(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        if self.compiled is not None:
            return self._compiled_forward(self.compiled, x, rotation, cache, metadata)
        x = added(x, self.attention(self.attention_norm(x), rotation, cache, metadata))
        return added(x, self.mlp(self.mlp_norm(x)))

    def _compiled_forward(
        self,
        block: GatedBlock,
        x: torch.Tensor,
        rotation: Rotation,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        attention = self.attention
        rows = cache.layers[attention.paged.layer_index]
        clear_entered(rows, metadata)
        heads = block.before_attention(x, rotation.cos, rotation.sin, rows, metadata.cache_rows)
        q, kv = heads.tensor_split((attention.num_heads,), dim=1)
        return block.after_attention(x, attention.paged.attend(q, kv, cache, metadata))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, index: int, build: Build) -> None:
        super().__init__()
        self.num_heads = build.shard.divide(config.num_heads, "the number of attention heads")
        self.num_kv_heads, _ = local_kv_heads(config.num_kv_heads, build)
        self.head_dim = config.head_dim
        self.qkv = QkvLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            build=build,
            has_bias=config.has_qkv_bias,
        )
        self.has_qk_norm = config.has_qk_norm
        if self.has_qk_norm:
            self.q_norm = RmsNorm(config.head_dim, config.norm_eps, build)
            self.k_norm = RmsNorm(config.head_dim, config.norm_eps, build)
        self.paged = PagedAttention(
            index, scale=config.head_dim**-0.5, window=config.windows[index]
        )
        self.output = RowLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            build,
            has_bias=config.has_output_bias,
        )

    def forward(
        self, x: torch.Tensor, rotation: Rotation, cache: KvCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        heads = self.qkv(x).unflatten(
            -1, (-1, self.head_dim)
        )  # [T, h + 2 kv_h, d]: queries, keys, values
        q, kv = heads.tensor_split((self.num_heads,), dim=1)
        if self.has_qk_norm:
            k = kv[:, : self.num_kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        rotation.apply_(heads[:, : self.num_heads + self.num_kv_heads])
        return self.output(self.paged(q, kv, cache, metadata))


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        size = config.intermediate_size
        has_bias = config.has_mlp_bias
        self.gate_up = MergedColumnLinear(
            config.hidden_size, [("gate", size), ("up", size)], build, has_bias=has_bias
        )
        self.down = RowLinear(size, config.hidden_size, build, has_bias=has_bias)
        self.activation = activation(config.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated(self.gate_up(x), self.activation))


def _weight_names(config: ModelConfig) -> WeightNames:
    table = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    per_layer = {
        "input_layernorm.weight": "attention_norm.weight",
        "self_attn.q_proj.weight": "attention.qkv.weight:q",
        "self_attn.k_proj.weight": "attention.qkv.weight:k",
        "self_attn.v_proj.weight": "attention.qkv.weight:v",
        "self_attn.o_proj.weight": "attention.output.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
        "mlp.gate_proj.weight": "mlp.gate_up.weight:gate",
        "mlp.up_proj.weight": "mlp.gate_up.weight:up",
        "mlp.down_proj.weight": "mlp.down.weight",
    }
    if config.has_qkv_bias:
        per_layer |= {f"self_attn.{part}_proj.bias": f"attention.qkv.bias:{part}" for part in "qkv"}
    if config.has_output_bias:
        per_layer["self_attn.o_proj.bias"] = "attention.output.bias"
    if config.has_mlp_bias:
        per_layer |= {
            f"mlp.{part}_proj.bias": f"mlp.gate_up.bias:{part}" for part in ("gate", "up")
        }
        per_layer["mlp.down_proj.bias"] = "mlp.down.bias"
    if config.has_qk_norm:
        per_layer |= {
            f"self_attn.{part}_norm.weight": f"attention.{part}_norm.weight" for part in "qk"
        }
    for layer in range(config.num_layers):
        table |= {
            f"model.layers.{layer}.{name}": f"layers.{layer}.{to}" for name, to in per_layer.items()
        }
    return WeightNames(
        table,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if config.is_head_tied else {},
        ignored=("rotary_emb.inv_freq",),
        prefix="model.",
    )
