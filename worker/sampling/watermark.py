"""The watermark: each token favours a half of the vocabulary, drawn by the token before it.

Who knows the hash key can count how many tokens of a text are in the green list of their
predecessor; in a text of n tokens that nobody marked, about gamma * n are.

Source: Kirchenbauer et al. 2023, "A watermark for large language models", algorithm 2 with one
token of context. Key, seed and permutation are TGI's and the authors', so their detector reads it.
"""

from collections import OrderedDict

import torch
from torch import Tensor

HASH_KEY = 15485863
_REMEMBERED = 512  # green lists; a list is a bit less than the vocabulary in bytes


class Watermark:
    """Green lists, of which the latest are remembered: a text repeats its tokens."""

    def __init__(self, vocab_size: int, *, gamma: float = 0.5, delta: float = 2.0) -> None:
        """`gamma`: share of the vocabulary that is green; `delta`: what is added to its logits."""
        self.delta = delta
        self._vocab_size = vocab_size
        self._num_green = int(vocab_size * gamma)
        self._generator = torch.Generator(device="cpu")
        self._lists: OrderedDict[int, Tensor] = OrderedDict()

    def green(self, previous_token: int) -> Tensor:
        """Which tokens are favoured after this one: `[vocab]` bool, on the CPU."""
        known = self._lists.pop(previous_token, None)
        if known is None:
            known = self._draw(previous_token)
            if len(self._lists) == _REMEMBERED:
                self._lists.popitem(last=False)
        self._lists[previous_token] = known
        return known

    def _draw(self, previous_token: int) -> Tensor:
        self._generator.manual_seed(HASH_KEY * previous_token)
        permutation = torch.randperm(self._vocab_size, generator=self._generator)
        green = torch.zeros(self._vocab_size, dtype=torch.bool)
        green[permutation[: self._num_green]] = True
        return green
