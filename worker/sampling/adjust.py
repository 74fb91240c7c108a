"""Rules 1 to 6, which change single logits, for the rows of a batch that ask for them. Rows without
a rule are not touched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ValidationError
from common.grammar import GrammarError
from common.messages import Failure
from worker.sampling import processors
from worker.sampling.entries import Entries
from worker.sampling.grammar import NextTokens
from worker.sampling.state import SlotState
from worker.sampling.watermark import Watermark


def adjust_(
    logits: Tensor,
    states: Sequence[SlotState],
    positions: Sequence[int],
    *,
    eos_tokens: Tensor,
    watermark: Watermark,
) -> dict[int, Failure]:
    """Apply the rules in place to `logits` `[rows, vocab]`; the failures, by row, of grammars that
    cannot be followed."""
    _add_bias(logits, states)
    _add_watermark(logits, states, watermark)
    _penalize(logits, states)
    follows, failures = _next_tokens(states)
    if follows:
        bits = torch.stack([follow.bits for follow in follows.values()])
        rows = torch.tensor(list(follows))
        processors.keep_grammatical_(
            logits, rows.to(logits.device), bits.to(logits.device, non_blocking=True)
        )
    # A text that is complete must end, however short it is.
    complete = {row for row, follow in follows.items() if follow.is_complete}
    _mask_ends(logits, states, positions, eos_tokens, except_rows=complete)
    return failures


def _add_bias(logits: Tensor, states: Sequence[SlotState]) -> None:
    biased = Entries()
    for row, state in enumerate(states):
        if state.sampling.logit_bias:
            tokens, bias = zip(*dict(state.sampling.logit_bias).items(), strict=True)
            biased.add(row, torch.tensor(tokens), torch.tensor(bias, dtype=torch.float32))
    if biased.rows:
        processors.add_logit_bias_(logits, *biased.tensors(logits.device))


def _add_watermark(logits: Tensor, states: Sequence[SlotState], watermark: Watermark) -> None:
    rows = [row for row, state in enumerate(states) if state.sampling.watermark]
    if rows:
        green = torch.stack([watermark.green(states[row].last_token) for row in rows])
        processors.add_watermark_(
            logits,
            torch.tensor(rows, device=logits.device),
            green.to(logits.device, non_blocking=True),
            watermark.delta,
        )


def _penalize(logits: Tensor, states: Sequence[SlotState]) -> None:
    repeated, counted = Entries(), Entries()
    for row, state in enumerate(states):
        rules, history = state.sampling, state.history
        if history is not None and rules.repetition_penalty != 1:
            repeated.add(row, history.tokens, rules.repetition_penalty)
        if history is not None and (rules.frequency_penalty or rules.presence_penalty):
            penalties = float(rules.frequency_penalty), float(rules.presence_penalty)
            counted.add(row, history.tokens, history.counts, *penalties)
    if repeated.rows:
        processors.penalize_repetition_(logits, *repeated.tensors(logits.device))
    if counted.rows:
        *entries, frequency, presence = counted.tensors(logits.device)
        processors.penalize_frequency_and_presence_(
            logits, *entries, frequency=frequency, presence=presence
        )


def _next_tokens(states: Sequence[SlotState]) -> tuple[dict[int, NextTokens], dict[int, Failure]]:
    follows: dict[int, NextTokens] = {}
    failures: dict[int, Failure] = {}
    for row, state in enumerate(states):
        if state.grammar is not None:
            try:
                follows[row] = state.grammar.next_tokens()
            except GrammarError as error:
                message = f"Input validation error: grammar is not valid: {error}"
                failures[row] = Failure(ValidationError.kind, message)
    return follows, failures


def _mask_ends(
    logits: Tensor,
    states: Sequence[SlotState],
    positions: Sequence[int],
    eos_tokens: Tensor,
    *,
    except_rows: set[int],
) -> None:
    masked = Entries()
    for row, (state, position) in enumerate(zip(states, positions, strict=True)):
        is_early = position - state.num_prompt_tokens < state.min_new_tokens
        if is_early and row not in except_rows:
            masked.add(row, eos_tokens)
    if masked.rows:
        processors.mask_tokens_(logits, *masked.tensors(logits.device))
