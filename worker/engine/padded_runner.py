"""Runs any model of transformers, decoder-only or encoder-decoder, with the cache that the model
itself makes: one for each slot, whatever it holds. Knows no plans.

A sequence that runs alone needs no padding and no mask, and the model need not support batches,
chunks or positions. That is right for every model, and slow: a step reads all weights once for each
sequence. Decoding sequences run together where a check at the start has shown that the model allows
it (worker/engine/self_check.py).
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from worker.engine.padded_cache import give_newest, is_plain, join, padding_mask
from worker.models.auto import UnsupportedModelError


@dataclass(slots=True)
class _Slot:
    """What a sequence has left behind."""

    cache: Any = None  # made by the model in its first call
    encoded: BaseModelOutput | None = None
    tokens: list[int] = field(default_factory=list)  # that the cache knows


class PaddedRunner:
    """A model and the caches of its sequences. Give a slot's tokens in order.

    A cache is made anew when its sequence grows beyond `recompute_after` tokens. `is_batching` says
    that decoding sequences may `run_together`.
    """

    def __init__(self, model: PreTrainedModel, *, recompute_after: int | None = None) -> None:
        self._model = model
        self._recompute_after = recompute_after
        self.is_batching = False
        self._slots: dict[int, _Slot] = {}
        names = set(inspect.signature(model.forward).parameters)
        # State space models call their state otherwise.
        self._cache_name = "past_key_values" if "past_key_values" in names else "cache_params"
        self._can_skip_logits = "logits_to_keep" in names
        self._has_positions = "position_ids" in names
        self._tokens_name = "decoder_input_ids" if self._is_encoder_decoder else "input_ids"

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(self._model.config.is_encoder_decoder)

    def start(self, slot: int, encoder_tokens: Sequence[int] = ()) -> None:
        """A new sequence; the encoder, if there is one, reads its input now."""
        self._slots[slot] = state = _Slot()
        if encoder_tokens:
            state.encoded = self._model.get_encoder()(input_ids=self._row(encoder_tokens))

    def release(self, slot: int) -> None:
        """Forget a sequence."""
        self._slots.pop(slot, None)

    def run(self, slot: int, tokens: Sequence[int], *, num_logits: int = 1) -> torch.Tensor:
        """The logits `[num_logits, V]` of the last of these tokens, which follow what the slot has
        seen."""
        state = self._slots[slot]
        num_known = len(state.tokens)
        state.tokens += tokens
        limit = self._recompute_after
        if limit is not None and num_known <= limit < len(state.tokens):
            state.cache, tokens = None, state.tokens
        inputs: dict[str, Any] = {self._tokens_name: self._row(tokens), "use_cache": True}
        if state.encoded is not None:
            inputs["encoder_outputs"] = state.encoded
        if state.cache is not None:
            inputs[self._cache_name] = state.cache
        if self._can_skip_logits:
            inputs["logits_to_keep"] = num_logits
        out = self._model(**inputs)
        state.cache = getattr(out, self._cache_name)
        return out.logits[0, -num_logits:]

    def run_together(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """The logits `[B, V]` of one more token of each of these slots, in one forward pass.

        Raises UnsupportedModelError for a model that cannot.
        """
        states = [self._slots[slot] for slot in slots]
        caches = [state.cache for state in states]
        if self._recompute_after is not None:
            raise UnsupportedModelError("its longrope treats a batch as its longest sequence needs")
        if not all(map(is_plain, caches)):
            raise UnsupportedModelError("its cache is not just keys and values")
        for state, token in zip(states, tokens, strict=True):
            state.tokens.append(token)
        lengths = [len(state.tokens) for state in states]
        device = self._model.device
        inputs: dict[str, Any] = {"attention_mask": padding_mask(lengths, device)}
        if self._has_positions:
            inputs["position_ids"] = torch.tensor(lengths, device=device)[:, None] - 1
        joined = join(caches)
        out = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            past_key_values=joined,
            use_cache=True,
            **inputs,
        )
        give_newest(joined, caches)
        return out.logits[:, -1]

    def whole_logits(
        self, tokens: Sequence[int], encoder_tokens: Sequence[int] = ()
    ) -> torch.Tensor:
        """The logits `[n, V]` of all tokens, without a cache: what the others must agree with."""
        inputs = {self._tokens_name: self._row(tokens), "use_cache": False}
        if encoder_tokens:
            inputs["input_ids"] = self._row(encoder_tokens)
        return self._model(**inputs).logits[0]

    def state_bytes(self, slot: int) -> int:
        """Memory that a sequence holds in its slot."""
        state = self._slots[slot]
        tensors = {id(tensor): tensor for tensor in _tensors((state.cache, state.encoded))}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _row(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self._model.device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside lists, dicts and plain objects, as caches are made of."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
