"""GPT-BigCode: StarCoder (Li et al. 2023) and SantaCoder (Ben Allal et al. 2023).

- GPT-2 (gpt2.py), with learned positions, LayerNorm and biases where that has them, and a tied head
- multi-query attention: all query heads share one key-value head, which every shard has
- without multi-query, the files have q, k and v of each head side by side, not as GPT-2 has them
- weights are stored as [outputs, inputs]; scores are scaled alike in all layers
- the original SantaCoder, whose code came with it, is the same model in other files: q apart from k
  and v, and the weights of a block stored [inputs, outputs] (Conv1D), as GPT-2 has them
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worker.models.config import ConfigError
from worker.models.gpt2 import Gpt2Config, Gpt2Model, gpt2_names
from worker.weights.pieces import WeightNames

ORIGINAL_SANTACODER = "GPT2LMHeadCustomModel"


class GptBigCodeModel(Gpt2Model):
    """The module of GPT-2: what differs is its config, and the names in its files."""

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> Gpt2Config:
        """A parsed config.json. Raises ConfigError."""
        config = Gpt2Model.read_config(
            {
                "activation_function": "gelu_pytorch_tanh",  # where the file is silent
                **hf,
                "scale_attn_by_inverse_layer_idx": False,  # whatever the file says: not done here
            }
        )
        return replace(
            config,
            num_kv_heads=1 if _is_multi_query(hf, config) else config.num_heads,
            is_transposed=_is_original(config),
        )

    @staticmethod
    def weight_names(config: Gpt2Config) -> WeightNames:
        """Where each tensor of a checkpoint belongs."""
        if _is_original(config):
            qkv = {"attn.q_attn": "attention.qkv:q", "attn.kv_attn": "attention.qkv:kv"}
        else:
            fused = "qkv" if config.num_kv_heads != config.num_heads else "heads"
            qkv = {"attn.c_attn": f"attention.qkv:{fused}"}
        return gpt2_names(config, qkv)


def _is_original(config: Gpt2Config) -> bool:
    """Whether the files are laid out as SantaCoder's own code does it."""
    return config.architecture == ORIGINAL_SANTACODER


def _is_multi_query(hf: Mapping[str, Any], config: Gpt2Config) -> bool:
    if not _is_original(config):
        return bool(hf.get("multi_query", True))
    kind = hf.get("attention_head_type", "multiquery")
    if kind != "multiquery":
        raise ConfigError(f"`attention_head_type` must be 'multiquery'. Given: {kind!r}")
    return True
