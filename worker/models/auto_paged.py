"""A causal model of transformers on our paged cache, without a line of its own code.

- transformers looks up attention and mask functions by name in two public registries; ours are
  added there, and the model is told to use them
- all sequences of a step are laid end to end, `[1, T]`, as in our own families; positions are
  given, masks are not made
- the cache and the metadata of a step travel to the attention function as a keyword argument of the
  model's forward

What the attention function cannot honour it refuses. A model may still do something that nobody
here sees: `worker/engine/self_check.py` compares before it serves.

Shapes: T tokens, h query heads, kv key-value heads, d features of a head.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from worker.kernels import sdpa
from worker.kernels.eager import ScoreRules
from worker.kernels.metadata import AttentionMetadata
from worker.layers.attention import KvCache
from worker.models.auto import AutoFacts, UnsupportedModelError, model_errors, text_config

ATTENTION_NAME = "tokenfleet_paged"
PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asks for."""

    layer_index: int
    q: torch.Tensor  # [T, h, d]
    kv: torch.Tensor  # [T, 2 * kv, d]
    scale: float
    window: int | None
    rules: ScoreRules | None


class AttentionStep(Protocol):
    """What travels through a model's forward: it answers each layer's call with `[T, h * d]`."""

    def attend(self, call: AttentionCall) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step on the paged cache."""

    cache: KvCache
    metadata: AttentionMetadata

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return sdpa.paged_attention(
            call.q,
            call.kv,
            self.cache.layers[call.layer_index],
            self.metadata,
            scale=call.scale,
            window=call.window,
            rules=call.rules,
        )


@dataclass(frozen=True, slots=True)
class Recorder:
    """Remembers what the layers ask for; its answers mean nothing."""

    calls: list[AttentionCall] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return torch.zeros_like(call.q).flatten(1)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls, with its names: query `[1, h, T, d]`, key and
    value `[1, kv, T, d]`. Raises UnsupportedModelError."""
    layer_index = getattr(module, "layer_idx", None)
    if paged_step is None:
        raise UnsupportedModelError("its layers do not pass keyword arguments on to the attention")
    if layer_index is None:
        raise UnsupportedModelError("its attention layers have no index")
    if attention_mask is not None or position_bias is not None:
        raise UnsupportedModelError("it gives its attention a mask or bias of its own")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedModelError("its attention is not causal")
    if query.shape[-1] != value.shape[-1] or key.shape != value.shape:
        raise UnsupportedModelError("its keys and values have different sizes")
    attended = paged_step.attend(
        AttentionCall(
            layer_index,
            q=query[0].transpose(0, 1),
            kv=torch.cat((key, value), dim=1)[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            rules=None if softcap is None and s_aux is None else ScoreRules(softcap, s_aux),
        )
    )
    return attended.view(1, query.shape[2], *query.shape[1::2]), None


def no_mask(*_: Any, **__: Any) -> None:
    """The mask function that transformers calls: the metadata of a step knows who sees whom."""


class AutoPagedModel(nn.Module):
    """A model of transformers as one of our own (`PagedModel`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` uses our attention from now on."""
        super().__init__()
        use_paged_attention(model)
        self.decoder = model.base_model
        self.head = _head(model)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Tokens and their positions, both `[T]`, to hidden states `[T, H]`; writes their keys and
        values."""
        return _run(self.decoder, tokens, positions, PagedStep(cache, metadata))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, H]` to logits `[n, V]`."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]


def use_paged_attention(model: PreTrainedModel) -> None:
    """Let the model look up our functions. Registering them again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, no_mask)
    model.set_attn_implementation(ATTENTION_NAME)


@torch.inference_mode()
def with_paged_cache(
    facts: AutoFacts, model: PreTrainedModel, *, max_total_tokens: int
) -> AutoFacts:
    """The facts with the sizes of a paged cache, as the layers themselves ask for it.

    Raises UnsupportedModelError if they need another kind of memory.
    """
    _check_config(model, max_total_tokens)
    use_paged_attention(model)
    recorder = Recorder()
    tokens = torch.zeros(2, dtype=torch.int64, device=model.device)
    with model_errors("on packed sequences"):
        _run(model.base_model, tokens, torch.arange(2, device=model.device), recorder)
    config = text_config(model)
    calls = sorted(recorder.calls, key=lambda call: call.layer_index)
    if [call.layer_index for call in calls] != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError("not every layer attends, once, to keys and values of its own")
    shapes = {tuple(call.kv.shape) for call in calls}
    if len(shapes) > 1:
        raise UnsupportedModelError("its layers have key-value heads of different sizes or numbers")
    _, both_heads, head_dim = shapes.pop()
    windows = tuple(call.window for call in calls)
    _check_windows(windows, config)
    return replace(
        facts,
        num_layers=len(calls),
        num_kv_heads=both_heads // 2,
        head_dim=head_dim,
        windows=windows,
    )


def _run(
    decoder: nn.Module, tokens: torch.Tensor, positions: torch.Tensor, step: AttentionStep
) -> torch.Tensor:
    out = decoder(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged_step=step
    )
    return out.last_hidden_state[0]


def _check_config(model: PreTrainedModel, max_total_tokens: int) -> None:
    if not model._supports_attention_backend:
        raise UnsupportedModelError("its attention cannot be replaced")
    if model.base_model is model:
        raise UnsupportedModelError("its decoder cannot be told from its head")
    config = text_config(model)
    switch = longrope_switch(config)
    if switch is not None and max_total_tokens > switch:
        raise UnsupportedModelError(
            "its longrope treats all sequences of a batch as the longest needs "
            f"(it would not with `max_total_tokens` <= {switch})"
        )


def longrope_switch(config: PretrainedConfig) -> int | None:
    """The length beyond which a longrope model rotates all positions by other factors, or None."""
    values = getattr(config, "rope_parameters", None) or {}
    ropes = [values] if "rope_type" in values else values.values()  # or one for each type of layer
    lengths = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in ropes
        if rope.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def _check_windows(windows: Sequence[int | None], config: PretrainedConfig) -> None:
    """The layers must have told what the config says."""
    kinds = getattr(config, "layer_types", None)
    if kinds and not set(kinds) <= PLAIN_LAYERS:
        others = ", ".join(sorted(set(kinds) - PLAIN_LAYERS))
        raise UnsupportedModelError(f"it has layers of another kind: {others}")
    window = getattr(config, "sliding_window", None)
    if kinds:
        expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        if expected != tuple(windows):
            raise UnsupportedModelError("its layers do not tell the attention their windows")
    elif window and not any(windows) and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError("its layers do not tell the attention their windows")


class _Given(nn.Module):
    """Stands where a decoder was: its output is what it gets."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head(model: PreTrainedModel) -> PreTrainedModel:
    """What the model does after its decoder: the head, and the scaling or capping of logits that
    many forwards have around it. A shallow copy; it shares all weights."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return head
