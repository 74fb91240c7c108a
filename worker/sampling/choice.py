"""Rules 7 to 11 and the choice itself, for rows whose logits have been adjusted.

    greedy           argmax and logsumexp
    random           on a CPU a kernel of ours (random_choice.cpp), which sorts nothing; else
      free           from the whole vocabulary in one pass
      filtered       top_k, top_p, typical_p or min_p: on the likeliest 256 tokens; if a rule would
                     keep more, on the likeliest 4096, and at last on the sorted vocabulary

The result is exact each time. A random choice is the Gumbel-max trick in its exponential form:
argmax of p / noise, the noise from `noise.py`, so that the same (prompt, seed) gives the same tokens
in any batch. Knows tensors and sampling values, no slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import Sampling
from worker.kernels.cpu.choices import greedy_choice, random_choice
from worker.sampling import processors
from worker.sampling.noise import exponential_noise, row_keys, token_table

_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
_CANDIDATES = (256, 4096)  # sizes that are tried before the whole vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen tokens of some rows, and what they were chosen from."""

    rows: list[int]
    tokens: Tensor  # [rows]
    logprobs: Tensor  # [rows]
    values: Tensor | None  # [rows, n] logits after all rules, -inf where dropped, if wanted
    log_total: Tensor  # [rows] their logsumexp
    ids: Tensor | None = None  # [rows, n] the values' tokens; None: the vocabulary in order


class Chooser:
    """Chooses a token for every row of a batch, each by its own rules."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._table = token_table(vocab_size, device)

    def choose(
        self, logits: Tensor, rules: Sequence[Sampling], positions: Sequence[int]
    ) -> list[Choice]:
        """For each row of `logits` `[rows, vocab]`, whose token will stand at its position."""
        greedy = [row for row, rule in enumerate(rules) if not rule.do_sample]
        choices = []
        if greedy:
            values = logits if len(greedy) == len(rules) else logits[self._index(greedy)]
            choices.append(_choose_greedily(greedy, values))
        drawn = [row for row, rule in enumerate(rules) if rule.do_sample]
        if drawn:
            their_rules = [rules[row] for row in drawn]
            seeds = [rule.seed for rule in their_rules]
            keys = row_keys(seeds, [positions[row] for row in drawn], self._device)
            found = draw_by_kernel(logits, drawn, their_rules, keys)
            choices += found or self.draw_by_torch(logits, drawn, their_rules, keys)
        return choices

    def draw_by_torch(
        self, logits: Tensor, rows: list[int], rules: list[Sampling], keys: Tensor
    ) -> list[Choice]:
        """A token for each of some rows of `logits`, with `row_keys` of theirs."""
        choices = []
        free = [i for i, rule in enumerate(rules) if not _is_filtered(rule)]
        for some in self._blocks(free):
            values = self._tempered(logits, [rows[i] for i in some], [rules[i] for i in some])
            noise = exponential_noise(keys[self._index(some)], self._table)
            choices.append(_race([rows[i] for i in some], values, noise))
        filtered = [i for i, rule in enumerate(rules) if _is_filtered(rule)]
        if filtered:
            some = [rows[i] for i in filtered]
            their_rules = [rules[i] for i in filtered]
            values = self._tempered(logits, some, their_rules)
            choices += self._choose_filtered(some, values, keys[self._index(filtered)], their_rules)
        return choices

    def _blocks(self, rows: list[int]) -> list[list[int]]:
        """Rows to be run at once. On a CPU one by one.

        A row's two dozen passes then stay in the cache.
        """
        size = 1 if self._device.type == "cpu" else max(len(rows), 1)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _tempered(self, logits: Tensor, rows: list[int], rules: list[Sampling]) -> Tensor:
        """Some rows' logits after the temperature."""
        temperatures = self._floats([_temperature(rule) for rule in rules])
        return processors.apply_temperature(logits[self._index(rows)].float(), temperatures)

    def _choose_filtered(
        self, rows: list[int], logits: Tensor, keys: Tensor, rules: list[Sampling]
    ) -> list[Choice]:
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

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _temperature(rule: Sampling) -> float:
    """What is next to zero stays above it as a float32: the likeliest token wins."""
    return max(rule.temperature, _LEAST_TEMPERATURE)


def _is_filtered(rule: Sampling) -> bool:
    return rule.top_k > 0 or rule.top_p < 1 or rule.typical_p < 1 or rule.min_p > 0


def draw_by_kernel(
    logits: Tensor, rows: list[int], rules: list[Sampling], keys: Tensor
) -> list[Choice] | None:
    """The same by the kernel; None where there is none. Values are made for those who want to see some."""
    choices = []
    for has_values in (False, True):
        some = [i for i, rule in enumerate(rules) if (rule.top_n_tokens > 0) == has_values]
        if not some:
            continue
        numbers = [
            (_temperature(rule), rule.top_k, rule.top_p, rule.typical_p, rule.min_p)
            for rule in (rules[i] for i in some)
        ]
        chosen = random_choice(
            logits,
            torch.tensor([rows[i] for i in some]),
            torch.tensor(numbers, dtype=torch.float32),
            keys[torch.tensor(some)],
            has_values=has_values,
        )
        if chosen is None:
            return None
        choices.append(
            Choice(
                [rows[i] for i in some],
                chosen.tokens,
                chosen.logprobs,
                chosen.values,
                chosen.log_totals,
            )
        )
    return choices


def _choose_greedily(rows: list[int], logits: Tensor) -> Choice:
    """The largest logit, the lowest token among equals."""
    choice = greedy_choice(logits)
    if choice is not None:
        tokens, chosen, log_total = choice
        return Choice(rows, tokens, chosen - log_total, logits, log_total)
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    log_total = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Choice(rows, tokens, chosen - log_total, logits, log_total)


def _race(rows: list[int], values: Tensor, noise: Tensor, ids: Tensor | None = None) -> Choice:
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
    return Choice(rows, tokens.squeeze(-1), logprobs, shifted, log_total, ids)
