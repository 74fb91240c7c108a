"""Which class computes which architecture: a table, and nothing is imported before it is needed.

Adding a family is one file and one line here. What is not in the table goes to transformers
(worker/engine/fallback.py).
"""

from importlib import import_module
from typing import Any

from worker.models.config import ConfigError

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("worker.models.llama", "LlamaModel"),
    "MistralForCausalLM": ("worker.models.llama", "LlamaModel"),
    "Qwen2ForCausalLM": ("worker.models.llama", "LlamaModel"),
    "Qwen3ForCausalLM": ("worker.models.llama", "LlamaModel"),
    "BloomForCausalLM": ("worker.models.bloom", "BloomModel"),
    "GPTNeoXForCausalLM": ("worker.models.gpt_neox", "GptNeoxModel"),
    "OPTForCausalLM": ("worker.models.opt", "OptModel"),
    "GPTBigCodeForCausalLM": ("worker.models.gpt_bigcode", "GptBigCodeModel"),
    "GPT2LMHeadCustomModel": ("worker.models.gpt_bigcode", "GptBigCodeModel"),
    "GPT2LMHeadModel": ("worker.models.gpt2", "Gpt2Model"),
    "T5ForConditionalGeneration": ("worker.models.t5", "T5Model"),
    "MT5ForConditionalGeneration": ("worker.models.t5", "T5Model"),
}


def has_family(architectures: list[str] | None) -> bool:
    """Whether a checkpoint's `architectures` name one of ours."""
    return any(architecture in ARCHITECTURES for architecture in architectures or ())


def model_class(architectures: list[str] | None) -> type[Any]:
    """The class for a checkpoint's `architectures`. Raises ConfigError if there is none."""
    for architecture in architectures or ():
        if architecture in ARCHITECTURES:
            module, name = ARCHITECTURES[architecture]
            return getattr(import_module(module), name)
    given = ", ".join(architectures or ()) or "nothing"
    raise ConfigError(
        f"`architectures` must name one of {', '.join(ARCHITECTURES)}. Given: {given}"
    )
