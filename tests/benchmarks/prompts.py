"""Prompts of an exact token count, all distinct unless a shared beginning is asked for. Knows
tokenizers, no server.
"""

import random
from collections.abc import Callable
from typing import Protocol

# Common English words: one token each, with the space before them, in the vocabularies of the
# served families.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education "
).split()
DRAWS = 8  # other words, when the length cannot be hit with these
CUTS = 6


class Encoding(Protocol):
    """What is needed of a tokenizer: how many tokens the server will see for a text."""

    def __call__(self, text: str) -> int: ...


class Prompts:
    """Prompt number i of a run. The same seed gives the same prompts. Two prompts have no more than
    a few words of their beginning in common, less than a block, so that no server answers from its
    prefix cache by accident.

    Args:
        num_tokens: length of every prompt, as `count` counts.
        count: tokens of a text, the special ones that a server adds included.
        seed: another seed gives prompts that share nothing with this one's.
        shared_share: part of each prompt, from its start, that all prompts have in common (0 to 1).
    """

    def __init__(
        self, num_tokens: int, count: Encoding, *, seed: int = 0, shared_share: float = 0.0
    ) -> None:
        if not 0 <= shared_share <= 1:
            raise ValueError(f"`shared_share` must be between 0 and 1. Given: {shared_share}")
        self._num_tokens = num_tokens
        self._count = count
        self._seed = seed
        shared = random.Random(f"{seed} shared")
        self._shared = shared.choices(WORDS, k=round(num_tokens * shared_share))

    def __call__(self, index: int) -> str:
        """Raises ValueError when no text of exactly `num_tokens` tokens was found."""
        draw = random.Random(f"{self._seed} {index}")
        for _ in range(DRAWS):
            text = self._fitted(self._shared + draw.choices(WORDS, k=self._num_tokens))
            if text is not None:
                return text
        raise ValueError(
            f"no prompt of exactly {self._num_tokens} tokens with this tokenizer; "
            "try another --prompt-tokens"
        )

    def _fitted(self, words: list[str]) -> str | None:
        """As many of the words as give the exact length; None when no number of them does."""
        size = self._num_tokens
        for _ in range(CUTS):
            text = " ".join(words[:size])
            excess = self._count(text) - self._num_tokens
            if excess == 0:
                return text
            size -= excess
            if not 0 < size <= len(words):
                return None
        return None


class BytePrompts:
    """Prompts for the echo model, whose tokens are bytes: `num_tokens` ASCII letters."""

    def __init__(self, num_tokens: int, *, seed: int = 0) -> None:
        self._num_tokens = num_tokens
        self._seed = seed

    def __call__(self, index: int) -> str:
        draw = random.Random(f"{self._seed} {index}")
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=self._num_tokens))


def prompts_for(
    tokenizer: str | None, num_tokens: int, *, seed: int = 0, shared_share: float = 0.0
) -> Callable[[int], str]:
    """Prompts counted by a `tokenizer.json`, by `bytes`, or, without a tokenizer, in words."""
    if tokenizer == "bytes":
        if shared_share:
            raise ValueError("a shared prefix is not offered for prompts that are counted in bytes")
        return BytePrompts(num_tokens, seed=seed)
    count = token_counter(tokenizer) if tokenizer else _count_words
    return Prompts(num_tokens, count, seed=seed, shared_share=shared_share)


def token_counter(path: str) -> Encoding:
    """Counts as a server with this `tokenizer.json` does."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)


def _count_words(text: str) -> int:
    return len(text.split())
