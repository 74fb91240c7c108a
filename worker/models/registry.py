"""Which class computes which architecture: a table, and nothing is imported before it is needed.

Adding a family is one file and one line here.
"""

from importlib import import_module
from typing import Any

from worker.models.config import ConfigError

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("worker.models.llama", "LlamaModel"),
    "MistralForCausalLM": ("worker.models.llama", "LlamaModel"),
    "Qwen2ForCausalLM": ("worker.models.llama", "LlamaModel"),
    "Qwen3ForCausalLM": ("worker.models.llama", "LlamaModel"),
}


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
