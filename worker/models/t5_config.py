"""What the config.json of a T5 or mT5 checkpoint says, in our words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.models.config import ConfigError, DecoderConfig, file_dtype, token_list

# Distances have no end, so neither do inputs and answers; this bounds what is reserved for one.
_MAX_TOTAL_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(DecoderConfig):
    """Sizes and switches of one model, before it is divided among shards.

    What the engine asks for (`num_layers`, `num_kv_heads`, `windows`) is told of the decoder, which
    is what has a KV cache.
    """

    intermediate_size: int
    num_encoder_layers: int
    num_buckets: int
    max_distance: int
    norm_eps: float
    activation: str
    is_gated: bool
    has_scaled_output: bool
    decoder_start_token: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "T5Config":
        """Read a parsed config.json. Raises ConfigError."""
        try:
            return _read(hf)
        except KeyError as error:
            raise ConfigError(
                f"config.json has no {error}, which this architecture needs"
            ) from error


def _read(hf: Mapping[str, Any]) -> T5Config:
    architecture = (hf.get("architectures") or [""])[0]
    is_mt5 = architecture.startswith("MT5")
    kind = hf.get("feed_forward_proj") or ("gated-gelu" if is_mt5 else "relu")
    prefix, _, name = kind.rpartition("-")
    if prefix not in ("", "gated"):
        raise ConfigError(f"feed_forward_proj must be an activation or `gated-` one. Given: {kind}")
    start_token = hf.get("decoder_start_token_id")
    # Where a file tells it apart (transformers 5), `tie_word_embeddings` is always true; before,
    # that was the only sign. mT5 never scales, whatever its files say.
    is_scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    num_layers = hf.get("num_decoder_layers") or hf["num_layers"]
    return T5Config(
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["d_model"],
        intermediate_size=hf["d_ff"],
        num_encoder_layers=hf["num_layers"],
        num_layers=num_layers,
        num_heads=hf["num_heads"],
        num_kv_heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        max_positions=_MAX_TOTAL_TOKENS,
        windows=(None,) * num_layers,
        num_buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        activation="gelu_new" if kind == "gated-gelu" else name,
        is_gated=prefix == "gated",
        has_scaled_output=bool(is_scaled) and not is_mt5,
        # T5 begins with padding where a file does not say.
        decoder_start_token=hf.get("pad_token_id", 0) if start_token is None else start_token,
        dtype=file_dtype(hf),
        eos_tokens=token_list(hf.get("eos_token_id", 1)),
    )
