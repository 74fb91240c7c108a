"""Which tokens a sequence has seen and how often it generated them: the memory of its penalties,
nothing else.

Kept on the host and only for sequences with a penalty: a few bytes per distinct token, not a row of
the vocabulary.

    token   17  203   5  991 |        spare room; doubles when it is used up
    count    0    2   0    1 |        times generated; 0: only in the prompt
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenHistory:
    """Distinct tokens of one sequence, in the order of their first appearance."""

    def __init__(self, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> None:
        distinct = list(dict.fromkeys((*prompt_tokens, *output_tokens)))
        self._index = {token: index for index, token in enumerate(distinct)}
        self._tokens = torch.tensor(distinct, dtype=torch.int64)
        self._counts = torch.zeros(len(distinct), dtype=torch.float32)
        for token in output_tokens:
            self.record(token)

    def record(self, token: int) -> None:
        """The sequence generated this token."""
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._tokens):
            self._tokens = torch.cat((self._tokens, torch.zeros(max(index, 16), dtype=torch.int64)))
            self._counts = torch.cat((self._counts, torch.zeros(max(index, 16))))
        self._tokens[index] = token
        self._counts[index] += 1

    @property
    def tokens(self) -> Tensor:
        """Distinct tokens `[n]`, int64."""
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> Tensor:
        """How often each was generated, `[n]`, float32."""
        return self._counts[: len(self._index)]
