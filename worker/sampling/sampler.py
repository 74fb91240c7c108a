"""Chooses the next token of every row of a batch, and tells its log-probability.

Keeps what the rules of each slot's sequence need; the rules themselves are in `adjust.py` (those
that change logits) and `choice.py` (those that shorten the list of tokens). A row pays only for the
rules that its request asks for. Knows tensors and sampling values, neither models nor text.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.plan import NO_TOKEN, Sampled, SequenceStart
from worker.sampling.adjust import adjust_
from worker.sampling.choice import Choice, Chooser
from worker.sampling.grammar import Grammars
from worker.sampling.state import SlotState
from worker.sampling.top_tokens import top_tokens
from worker.sampling.watermark import Watermark


class Sampler:
    """Holds the sampling state of every slot. One engine thread uses it.

    A row whose logits are broken (a NaN, +inf, or no token left that may be chosen) or whose
    grammar cannot be followed yields `NO_TOKEN` with a NaN log-probability: only its own request
    fails, the other rows are untouched.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        *,
        eos_tokens: tuple[int, ...],
        device: torch.device | str,
        grammars: Grammars | None = None,
        watermark: Watermark | None = None,
    ) -> None:
        """Without `grammars` no request may have one."""
        self._slots: list[SlotState | None] = [None] * num_slots
        self._eos_tokens = torch.tensor(eos_tokens, dtype=torch.int64)
        self._chooser = Chooser(vocab_size, torch.device(device))
        self._grammars = grammars
        self._watermark = watermark or Watermark(vocab_size)

    def start(self, start: SequenceStart) -> None:
        """A sequence takes a slot; what it generated before counts for its penalties and its
        grammar."""
        grammar = start.sampling.grammar
        matcher = None
        if grammar is not None:
            assert self._grammars is not None, "a sampler that follows no grammars"
            matcher = self._grammars.start(grammar, start.output_tokens)
        self._slots[start.slot] = SlotState.of(start, matcher)

    def release(self, slot: int) -> None:
        """The sequence in this slot ended or was preempted."""
        self._slots[slot] = None

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> list[Sampled]:
        """Choose a token for each row of `logits` `[rows, vocab]`; penalties overwrite float32 logits.

        `slots[i]` says whose row it is, `positions[i]` the absolute position of the token being
        chosen. The chosen tokens enter the slots' penalty state.
        """
        states = [self._state(slot) for slot in slots]
        if any(state.has_rules for state in states):
            logits = logits.float()
        failures = adjust_(
            logits, states, positions, eos_tokens=self._eos_tokens, watermark=self._watermark
        )
        results: list[Sampled | None] = [None] * len(states)
        for row, failure in failures.items():
            results[row] = Sampled(slots[row], NO_TOKEN, math.nan, failure=failure)
        rules = [state.sampling for state in states]
        for choice in self._chooser.choose(logits, rules, positions):
            self._report(choice, states, slots, results)
        return [result for result in results if result is not None]

    def _state(self, slot: int) -> SlotState:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is empty"
        return state

    def _report(
        self,
        choice: Choice,
        states: list[SlotState],
        slots: Sequence[int],
        results: list[Sampled | None],
    ) -> None:
        """Bring a choice to the host and record it."""
        tops = _tops(choice, [states[row].sampling.top_n_tokens for row in choice.rows])
        chosen = zip(
            choice.rows, choice.tokens.tolist(), choice.logprobs.tolist(), tops, strict=True
        )
        for row, token, logprob, top in chosen:
            if results[row] is not None:
                continue
            if not math.isfinite(logprob):
                results[row] = Sampled(slots[row], NO_TOKEN, math.nan)
                continue
            results[row] = Sampled(slots[row], token, logprob, top)
            states[row].record(token)


def _tops(choice: Choice, num_top: list[int]) -> list[tuple[tuple[int, float], ...]]:
    if choice.values is None:
        assert not any(num_top), "nobody wanted them"
        return [()] * len(num_top)
    return top_tokens(choice.values, choice.log_total, num_top, choice.ids)
