"""Structured output: which tokens may come next so that the text follows the request's grammar.

llguidance parses the text token by token. Its work is done in threads of its own, away from the
engine's: a grammar is compiled while the prompt runs, and the mask of the next token is computed
while the step that chose this one is told to clients.

    start ──compile, replay──► mask ──record(token)──► consume, mask ──► mask ...
             in the pool              returns at once     in the pool

The batch waits for the masks of all its rows, so a grammar that costs too much fails its own request.
Limits stop most of them within milliseconds. But llguidance counts what it keeps, not what it tries,
and some grammars take seconds within any limit: those the budget stops (grammar_budget.py).

Every row compiles its own, even where another has the same: llguidance's copies of a matcher share a
lexer and its limits, so that a request whose text exhausts them would end all others of its grammar.

Knows tokens and grammars, no logits and no requests. Source: Microsoft's llguidance (an Earley
parser over derivatives of regular expressions).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLTokenizer
from torch import Tensor

from common.grammar import GrammarError, compiled, short_reason
from common.messages import Grammar
from worker.sampling.grammar_budget import GrammarBudget
from worker.sampling.token_bytes import has_metaspace_decoder, wrapped_tokenizer

_THREADS = 64  # so many that hardly a row waits behind another's expensive grammar
_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class NextTokens:
    """`bits` `[words]` int32 has a bit for each token, lowest first: 1 may come next.

    `is_complete`: the text is finished, and nothing but an end of sequence may follow.
    """

    bits: Tensor
    is_complete: bool


class Grammars:
    """Makes matchers for one tokenizer. The tokenizer's tables are built in the background."""

    def __init__(self, tokenizer_json: str, *, eos_tokens: Sequence[int]) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._eos_tokens = tuple(eos_tokens)
        self._tokenizer = self._pool.submit(_read_tokenizer, tokenizer_json, self._eos_tokens)

    def start(self, grammar: Grammar, output_tokens: Sequence[int]) -> "GrammarMatcher":
        """A matcher that has seen `output_tokens`; returns before the grammar is compiled."""
        return GrammarMatcher(
            grammar, tuple(output_tokens), self._eos_tokens, self._tokenizer, self._pool
        )


class GrammarMatcher:
    """Follows the text of one sequence. One thread uses it; at most one of its jobs is under way."""

    def __init__(
        self,
        grammar: Grammar,
        output_tokens: tuple[int, ...],
        eos_tokens: tuple[int, ...],
        tokenizer: "Future[LLTokenizer]",
        pool: ThreadPoolExecutor,
    ) -> None:
        self._eos_tokens = frozenset(eos_tokens)
        self._pool = pool
        self._budget = GrammarBudget()
        self._next = pool.submit(self._begin, grammar, output_tokens, tokenizer)

    def next_tokens(self) -> NextTokens:
        """What may come next; waits for it. Raises GrammarError when nothing can, or when it is too
        expensive to find out."""
        while True:
            try:
                return self._next.result(timeout=_LOOK_EVERY_S)
            except TimeoutError:
                self._check_budget()

    def record(self, token: int) -> None:
        """The sequence generated this token, one of `next_tokens`."""
        self._next = self._pool.submit(self._advance, token)

    def _begin(
        self, grammar: Grammar, output_tokens: tuple[int, ...], tokenizer: "Future[LLTokenizer]"
    ) -> NextTokens:
        self._matcher = compiled(grammar, tokenizer.result())
        self._bits = np.zeros(-(-tokenizer.result().vocab_size // 32), dtype=np.uint32)
        self._ends = np.zeros_like(self._bits)
        for token in self._eos_tokens:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._consume(output_tokens)
        with self._budget.step():
            return self._compute_mask()

    def _advance(self, token: int) -> NextTokens:
        with self._budget.step():
            self._consume((token,))
            found = self._compute_mask()
        self._check_budget()
        return found

    def _consume(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Nothing follows the end, but a request may go on after it: with the end, again.
            if not (self._matcher.is_stopped() and token in self._eos_tokens):
                self._matcher.consume_token(token)
        self._check()

    def _compute_mask(self) -> NextTokens:
        bits = np.empty_like(self._bits)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()
        if not bits.any():
            raise GrammarError("no token of the model continues the text as the grammar demands")
        is_complete = not (bits & ~self._ends).any()
        return NextTokens(torch.from_numpy(bits.view(np.int32)), is_complete)

    def _check(self) -> None:
        """A compiled grammar and tokens of its own masks leave the limits as the only thing to fail."""
        if self._matcher.is_error():
            raise _too_expensive(short_reason(self._matcher.get_error()))

    def _check_budget(self) -> None:
        if self._budget.is_overspent:
            raise _too_expensive("other requests would have to wait for it; make it less ambiguous")


def _too_expensive(reason: str) -> GrammarError:
    """For the client."""
    return GrammarError(f"too expensive to follow: {reason}")


def _read_tokenizer(tokenizer_json: str, eos_tokens: tuple[int, ...]) -> LLTokenizer:
    """Takes about 0.3 s for 50 000 tokens. Raises GrammarError for one that llguidance cannot read."""
    if not eos_tokens:
        raise GrammarError("the model has no end-of-sequence token, which ends such a text")
    is_metaspace = has_metaspace_decoder(tokenizer_json)
    source = wrapped_tokenizer(tokenizer_json, eos_tokens) if is_metaspace else tokenizer_json
    try:
        return LLTokenizer(source, eos_token=list(eos_tokens))
    except ValueError as error:
        raise GrammarError(f"the model's tokenizer is of no use for grammars: {error}") from error
