"""Any text generation model that transformers can load: which of its classes, its facts, its
weights. The last row of the registry, for checkpoints that no family of ours computes.

Transformers takes seconds to import, so whoever imports this file does it when it is needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from worker.models.config import ConfigError, token_list
from worker.weights.files import ModelFolder

# How config classes call the longest sequence; most answer to the first name, whatever is in the
# file.
MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


class UnsupportedModelError(ValueError):
    """A path cannot run this model; the message is a clause that says why."""


@contextmanager
def model_errors(where: str) -> Iterator[None]:
    """Whatever a model's own code raises, as UnsupportedModelError. Memory is not its fault."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(f"{where} it fails ({reason})") from error


@dataclass(frozen=True, slots=True)
class AutoFacts:
    """What the engine needs to know (`ServedConfig`), and how generation begins.

    `max_positions` is 0 if the model has no limit of its own. The numbers of a paged cache are 0 as
    long as the model has none.
    """

    architecture: str
    vocab_size: int  # width of the logits
    max_positions: int
    dtype: str
    eos_tokens: tuple[int, ...]
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    windows: tuple[int | None, ...] = ()
    decoder_start_token: int | None = None
    forced_first_token: int | None = None
    suppressed_tokens: tuple[int, ...] = ()  # an encoder-decoder model was never to choose them


def load_auto(
    folder: ModelFolder, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with the weights of its safetensors files, ready to run.

    The files are mapped, not read into memory twice. Raises ConfigError with one sentence.
    """
    config = folder.config()
    auto_class, needs_code = _auto_class(config)
    if needs_code and not trust_remote_code:
        raise ConfigError(
            f"{folder.path} brings Python code of its own for {_name(config)}; "
            "read it, then allow it with --trust-remote-code"
        )
    folder.weight_files()  # says what is wrong if there is no safetensors file
    try:
        model, report = auto_class.from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=needs_code,
            attn_implementation=None if needs_code else "eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"transformers cannot load {_name(config)}: {reason}") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ConfigError(
            f"the weight files lack {len(names)} tensors that {_name(config)} needs, "
            f"for example {names[0]}"
        )
    return model.eval().to(device)


def read_facts(model: PreTrainedModel, *, vocab_size: int) -> AutoFacts:
    """The facts of a loaded model. Raises ConfigError."""
    text = text_config(model)
    start = _generation_value(model, "decoder_start_token_id")
    if start is None:
        start = _generation_value(model, "bos_token_id")
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    if is_encoder_decoder and start is None:
        raise ConfigError("config.json names no `decoder_start_token_id`, which a decoder needs")
    forced = _generation_value(model, "forced_bos_token_id") if is_encoder_decoder else None
    lengths = (getattr(text, name, None) for name in MAX_POSITIONS)
    return AutoFacts(
        architecture=type(model).__name__,
        vocab_size=vocab_size,
        max_positions=next((int(length) for length in lengths if length), 0),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_tokens=token_list(_generation_value(model, "eos_token_id")),
        decoder_start_token=start if is_encoder_decoder else None,
        forced_first_token=forced,
        suppressed_tokens=_suppressed(model) if is_encoder_decoder else (),
    )


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The part of a config that speaks of the text decoder."""
    return model.config.get_text_config(decoder=True)


def _auto_class(config: Mapping[str, Any]) -> tuple[type, bool]:
    """AutoModelFor..., and whether only the code of the checkpoint knows the model. Code is never
    run where transformers has a class of its own."""
    names = tuple(config.get("architectures") or ())
    kind = config.get("model_type", "")
    for auto_class, table in (
        (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        known = table.get(kind, ())
        known = (known,) if isinstance(known, str) else tuple(known)
        if known and (not names or set(names) & set(known)):
            return auto_class, False
    for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        if auto_class.__name__ in config.get("auto_map", {}):
            return auto_class, True
    raise ConfigError(
        "`architectures` must name a model that generates text: a family of our own engine, or one "
        "that transformers loads as AutoModelForCausalLM or AutoModelForSeq2SeqLM. "
        f"Given: {_name(config)}"
    )


def _name(config: Mapping[str, Any]) -> str:
    return ", ".join(config.get("architectures") or ()) or config.get("model_type") or "nothing"


def _generation_value(model: PreTrainedModel, name: str) -> Any:
    """Of generation_config.json, or else of config.json and what its class assumes."""
    value = getattr(model.generation_config, name, None)
    return getattr(text_config(model), name, None) if value is None else value


def _suppressed(model: PreTrainedModel) -> tuple[int, ...]:
    """`suppress_tokens`, and what is in `bad_words_ids` as a single token: Marian's padding."""
    bad_words = _generation_value(model, "bad_words_ids") or ()
    single = [words[0] for words in bad_words if len(words) == 1]
    return (*(_generation_value(model, "suppress_tokens") or ()), *single)
