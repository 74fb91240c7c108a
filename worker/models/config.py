"""What the config.json of a checkpoint says, in our words. The only file that knows its quirks.

Two generations of names are read: `rope_scaling` with a bare `rope_theta`, and transformers 5's
`rope_parameters`; `torch_dtype` and `dtype`. Transformers itself is not imported: that would cost
seconds at every start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from worker.layers.rotary import ROPE_KINDS, RopeConfig


class ConfigError(ValueError):
    """A checkpoint's config.json asks for something that this engine does not compute."""


class ServedConfig(Protocol):
    """What the engine needs to know of any model, whatever else its family's config holds."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    dtype: str
    eos_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes of a model with a decoder, before it is divided among shards: what the engine needs to
    know, and what the parts that families share are made of. A family adds its own."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]  # a layer each: how many newest positions it sees; None is all
    dtype: str  # of the files, as the config names it; empty if it does not
    eos_tokens: tuple[int, ...]
    # Where a scaled rope reaches further than `max_positions`: who asks may have it.
    max_stretched_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """Of the Llama family: its switches."""

    intermediate_size: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of the attention's output projection
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    is_head_tied: bool = False  # to the embedding; used when the files have no tensor for the head

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed config.json. Raises ConfigError."""
        try:
            return _llama_family(hf)
        except KeyError as error:
            raise ConfigError(
                f"config.json has no {error}, which this architecture needs"
            ) from error


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a family's config class assumes where the file is silent."""

    max_positions: int
    window: int | None = None
    has_window_switch: bool = False  # `use_sliding_window` must be true for the window to count
    has_fixed_qkv_bias: bool = False
    has_qk_norm: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Defaults(max_positions=2048),
    "MistralForCausalLM": _Defaults(max_positions=131_072, window=4096),
    "Qwen2ForCausalLM": _Defaults(
        max_positions=32_768, window=4096, has_window_switch=True, has_fixed_qkv_bias=True
    ),
    "Qwen3ForCausalLM": _Defaults(
        max_positions=32_768, window=4096, has_window_switch=True, has_qk_norm=True
    ),
}


def _llama_family(hf: Mapping[str, Any]) -> ModelConfig:
    architecture = (hf.get("architectures") or [""])[0]
    if architecture not in _FAMILIES:
        raise ConfigError(
            f"architecture {architecture!r} is unknown to ModelConfig; "
            f"known: {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[architecture]
    has_bias = bool(hf.get("attention_bias", False))
    num_heads = hf["num_attention_heads"]
    max_positions = hf.get("max_position_embeddings") or family.max_positions
    rope = rope_config(hf, max_positions)
    if (partial := partial_rotary_factor(hf, 1.0)) != 1:
        raise ConfigError(f"partial_rotary_factor must be 1 in this family. Given: {partial}")
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        # Of a dynamic rope, files tell the length before scaling; see `stretched_positions`.
        max_positions=int(max_positions * rope.factor) if rope.kind == "dynamic" else max_positions,
        max_stretched_positions=stretched_positions(rope, max_positions),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=hf.get("hidden_act", "silu"),
        rope=rope,
        windows=_windows(hf, family),
        has_qkv_bias=family.has_fixed_qkv_bias or has_bias,
        has_output_bias=has_bias and not family.has_fixed_qkv_bias,
        has_mlp_bias=bool(hf.get("mlp_bias", False)),
        has_qk_norm=family.has_qk_norm,
        is_head_tied=bool(hf.get("tie_word_embeddings", False)),
        dtype=file_dtype(hf),
        eos_tokens=token_list(hf.get("eos_token_id")),
    )


def _windows(hf: Mapping[str, Any], family: _Defaults) -> tuple[int | None, ...]:
    num_layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window", family.window) if family.window else None
    if family.has_window_switch and not hf.get("use_sliding_window", False):
        window = None
    if not window:
        return (None,) * num_layers
    if not family.has_window_switch:
        return (window,) * num_layers
    full_layers = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "full_attention" if layer < full_layers else "sliding_attention"
        for layer in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def partial_rotary_factor(hf: Mapping[str, Any], default: float) -> float:
    """Which share of a head's features turns."""
    values = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return float(values.get("partial_rotary_factor", hf.get("partial_rotary_factor", default)))


def rope_config(hf: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """How the positions of any family with a rope turn its heads. Raises ConfigError."""
    values = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope type must be one of {', '.join(ROPE_KINDS)}. Given: {kind!r}")
    original = values.get("original_max_position_embeddings") or max_positions
    if kind == "dynamic":  # this rule counts from the config's own length, as transformers does
        original = max_positions
    factor = values.get("factor")
    if factor is None:
        factor = max_positions / original if kind == "yarn" else 1.0
    return RopeConfig(
        kind=kind,
        theta=float(values.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        factor=float(factor),
        original_max_positions=original,
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 4.0),
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        attention_factor=values.get("attention_factor"),
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        has_rounded_range=values.get("truncate", True),
    )


def stretched_positions(rope: RopeConfig, max_positions: int) -> int:
    """How far a rope's factor reaches.

    A file's `max_positions` is the length before scaling (a linear rope; YaRN as Qwen tells how to
    switch it on) or after it (Llama 3), and never says which. This is the length after, where the
    other may be the one before.
    """
    if rope.kind == "yarn":
        return int(rope.original_max_positions * rope.factor)
    return int(max_positions * rope.factor) if rope.kind == "linear" else max_positions


def required(hf: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` that config.json has. Raises ConfigError."""
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise ConfigError(f"config.json has no {names[0]!r}, which this architecture needs")


def multi_head_sizes(
    hf: Mapping[str, Any], *, hidden_size: int, num_layers: int, num_heads: int
) -> dict[str, Any]:
    """What `DecoderConfig` asks for, but for `max_positions`, of a model whose heads divide the
    hidden size, each with a key-value head and a view of everything. Raises ConfigError."""
    return {
        "architecture": required(hf, "architectures")[0],
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": _head_size(hidden_size, num_heads),
        "windows": (None,) * num_layers,
        "dtype": file_dtype(hf),
        "eos_tokens": token_list(hf.get("eos_token_id")),
    }


def _head_size(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ConfigError(
            "the hidden size must be divisible by the number of attention heads. "
            f"Given: {hidden_size} and {num_heads}"
        )
    return hidden_size // num_heads


def file_dtype(hf: Mapping[str, Any]) -> str:
    """The number format of the files, as the config names it; empty if it does not."""
    return str(hf.get("dtype") or hf.get("torch_dtype") or "")


def token_list(value: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` field, which may be absent, one id or several, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
