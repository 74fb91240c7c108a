"""Chooses the next token of every row of a batch, and tells its log-probability.

A row pays only for the rules that its request asks for:

    greedy           argmax and logsumexp
    free             samples from the whole vocabulary: one pass, no sort
    filtered         top_k, top_p, typical_p or min_p: works on the likeliest 256 tokens; if a
                     rule would keep more, on the likeliest 4096, and at last on the sorted
                     vocabulary. The result is exact each time.

Sampling is the Gumbel-max trick in its exponential form: argmax of p / noise, the noise from
`noise.py`, so that the same (prompt, seed) gives the same tokens in any batch. Knows tensors and
sampling values, neither models nor text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import Sampling
from worker.engine.plan import NO_TOKEN, Sampled, SequenceStart
from worker.kernels.cpu.library import greedy_choice
from worker.sampling import processors
from worker.sampling.adjust import adjust_
from worker.sampling.grammar import Grammars
from worker.sampling.noise import exponential_noise, row_keys, token_table
from worker.sampling.state import SlotState
from worker.sampling.top_tokens import top_tokens
from worker.sampling.watermark import Watermark

_CANDIDATES = (256, 4096)  # sizes that are tried before the whole vocabulary


@dataclass(slots=True)
class _Choice:
    """The chosen tokens of some rows, and what they were chosen from."""

    rows: list[int]
    tokens: Tensor  # [rows]
    logprobs: Tensor  # [rows]
    values: Tensor  # [rows, n] logits after all rules, -inf where dropped
    log_total: Tensor  # [rows] their logsumexp
    ids: Tensor | None = None  # [rows, n] the values' tokens; None: the vocabulary in order


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
        self._device = torch.device(device)
        self._slots: list[SlotState | None] = [None] * num_slots
        self._eos_tokens = torch.tensor(eos_tokens, dtype=torch.int64)
        self._table = token_table(vocab_size, self._device)
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
        for choice in self._choose(logits, states, positions):
            self._report(choice, states, slots, results)
        return [result for result in results if result is not None]

    def _state(self, slot: int) -> SlotState:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is empty"
        return state

    def _choose(
        self, logits: Tensor, states: list[SlotState], positions: Sequence[int]
    ) -> list[_Choice]:
        """Rules 7 to 11 and the choice, for each kind of row."""
        greedy = [row for row, state in enumerate(states) if not state.sampling.do_sample]
        choices = []
        if greedy:
            values = logits if len(greedy) == len(states) else logits[self._index(greedy)]
            choices.append(_choose_greedily(greedy, values))
        free = [row for row, s in enumerate(states) if s.sampling.do_sample and not s.is_filtered]
        for rows in self._blocks(free):
            values, keys = self._prepare(logits, rows, states, positions)
            choices.append(_race(rows, values, exponential_noise(keys, self._table)))
        filtered = [row for row, s in enumerate(states) if s.sampling.do_sample and s.is_filtered]
        if filtered:
            values, keys = self._prepare(logits, filtered, states, positions)
            choices += self._choose_filtered(
                filtered, values, keys, [states[row].sampling for row in filtered]
            )
        return choices

    def _blocks(self, rows: list[int]) -> list[list[int]]:
        """Rows to be run at once. On a CPU one by one.

        A row's two dozen passes then stay in the cache.
        """
        size = 1 if self._device.type == "cpu" else max(len(rows), 1)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _prepare(
        self, logits: Tensor, rows: list[int], states: list[SlotState], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits after the temperature, and noise keys, of some rows."""
        temperatures = self._floats([states[row].sampling.temperature for row in rows])
        values = processors.apply_temperature(logits[self._index(rows)].float(), temperatures)
        seeds = [states[row].sampling.seed for row in rows]
        return values, row_keys(seeds, [positions[row] for row in rows], self._device)

    def _choose_filtered(
        self, rows: list[int], logits: Tensor, keys: Tensor, rules: list[Sampling]
    ) -> list[_Choice]:
        """Shorten the rows and choose.

        Rows that need more candidates than a size offers go on to the next.
        """
        choices = []
        log_total = logits.logsumexp(dim=-1)
        pending = list(range(len(rows)))
        vocab_size = logits.shape[-1]
        for size in (*(size for size in _CANDIDATES if size < vocab_size), vocab_size):
            index = self._index(pending)
            values, ids = logits[index].topk(size, dim=-1)
            values, is_exact = self._shorten(values, log_total[index], [rules[i] for i in pending])
            done = [i for i, exact in enumerate(is_exact.tolist()) if exact or size == vocab_size]
            if done:
                at = self._index(done)
                noise = exponential_noise(keys[index][at], self._table[ids[at]])
                choices.append(_race([rows[pending[i]] for i in done], values[at], noise, ids[at]))
            pending = [p for i, p in enumerate(pending) if i not in set(done)]
            if not pending:
                break
        return choices

    def _shorten(
        self, values: Tensor, log_total: Tensor, rules: list[Sampling]
    ) -> tuple[Tensor, Tensor]:
        """Rules 8 to 11 on descending rows `[rows, n]`.

        Also which rows `[rows]` would not change with a larger n.

        That is so when a rule has dropped the last candidate before a rule ran that needs what lies
        beyond it.
        """
        top_k = torch.tensor([r.top_k for r in rules], device=self._device)
        top_p = self._floats([r.top_p for r in rules])
        typical_p = self._floats([r.typical_p for r in rules])
        min_p = self._floats([r.min_p for r in rules])
        if any(r.top_k > 0 for r in rules):
            values = processors.keep_top_k(values, top_k)
            log_total = torch.where(top_k > 0, values.logsumexp(dim=-1), log_total)
        is_exact = values[:, -1].isneginf()
        if any(r.top_p < 1 for r in rules):
            values = processors.keep_top_p(values, top_p, log_total)
            is_exact |= values[:, -1].isneginf() & (top_k == 0)
        if any(r.typical_p < 1 for r in rules):
            values = processors.keep_typical(values, typical_p)
        if any(r.min_p > 0 for r in rules):
            values = processors.keep_min_p(values, min_p)
            is_exact |= values[:, -1].isneginf() & (top_k == 0) & (typical_p >= 1)
        return values, is_exact

    def _report(
        self,
        choice: _Choice,
        states: list[SlotState],
        slots: Sequence[int],
        results: list[Sampled | None],
    ) -> None:
        """Bring a choice to the host and record it."""
        num_top = [states[row].sampling.top_n_tokens for row in choice.rows]
        tops = top_tokens(choice.values, choice.log_total, num_top, choice.ids)
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

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _choose_greedily(rows: list[int], logits: Tensor) -> _Choice:
    """The largest logit, the lowest token among equals."""
    choice = greedy_choice(logits)
    if choice is not None:
        tokens, chosen, log_total = choice
        return _Choice(rows, tokens, chosen - log_total, logits, log_total)
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    log_total = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return _Choice(rows, tokens, chosen - log_total, logits, log_total)


def _race(rows: list[int], values: Tensor, noise: Tensor, ids: Tensor | None = None) -> _Choice:
    """Draw from softmax(values).

    P / noise is largest for a token with probability p (an exponential race).

    The same as argmax(values - log(noise)), where -log(noise) is Gumbel noise, with half the
    logarithms.
    """
    shifted = values - values.amax(dim=-1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(dim=-1).log()
    winner = weights.div_(noise).argmax(dim=-1, keepdim=True)
    logprobs = shifted.gather(-1, winner).squeeze(-1) - log_total
    tokens = winner if ids is None else ids.gather(-1, winner)
    return _Choice(rows, tokens.squeeze(-1), logprobs, shifted, log_total, ids)
