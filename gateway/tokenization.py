"""Text to token ids with the `tokenizer.json` that a worker published. Knows neither HTTP nor Redis.

A short prompt is encoded on the event loop: it takes less time than the way to a thread and back. A long one goes to
a thread, where the tokenizer works without Python's lock.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tokenizers import Encoding, Tokenizer

from common.errors import ValidationError
from gateway.galactica import mark_sequences, unmarked_offset

PROMPT_STYLES = ("", "galactica")
INLINE_CHARACTERS = 1000  # at most 0.4 ms, with a token for every byte


@dataclass(frozen=True, slots=True)
class Span:
    """A token of a text with its place in it, in characters."""

    id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """The tokenizer of one model; `prompt_style` is its card's."""

    def __init__(
        self, tokenizer: Tokenizer, executor: ThreadPoolExecutor, *, prompt_style: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._executor = executor
        self._prompt_style = prompt_style

    def styled(self, prompt_style: str) -> "TextTokenizer":
        """The same tokenizer for prompts of a style. Raises ValueError for one that is not known."""
        if prompt_style == self._prompt_style:
            return self
        if prompt_style not in PROMPT_STYLES:
            raise ValueError(f"the prompt style {prompt_style!r} is newer than this gateway")
        return TextTokenizer(self._tokenizer, self._executor, prompt_style=prompt_style)

    async def encode(self, text: str, *, adds_special_tokens: bool = True) -> list[int]:
        """Token ids. A chat's text has its special tokens already. Raises ValidationError."""
        prepared = self._prepared(text)
        return (await self._encoding(prepared, adds_special_tokens=adds_special_tokens)).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(list(tokens))

    async def spans(self, text: str, *, adds_special_tokens: bool = True) -> list[Span]:
        """Tokens with their places in `text`; added special tokens have none. Raises ValidationError."""
        prepared = self._prepared(text)
        encoding = await self._encoding(prepared, adds_special_tokens=adds_special_tokens)
        spans = []
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if prepared is not text:
                start, stop = unmarked_offset(prepared, start), unmarked_offset(prepared, stop)
            spans.append(Span(id, text[start:stop], start, stop))
        return spans

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._tokenizer.id_to_token(id) or ""

    def _prepared(self, text: str) -> str:
        return mark_sequences(text) if self._prompt_style == "galactica" else text

    async def _encoding(self, text: str, *, adds_special_tokens: bool) -> Encoding:
        encode = partial(self._tokenizer.encode, text, add_special_tokens=adds_special_tokens)
        try:
            if len(text) <= INLINE_CHARACTERS:
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self._executor, encode)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValidationError(f"Input validation error: tokenizer error {error}") from error


class TokenizerCache:
    """Tokenizers by the digest of their file, and the threads that they work in."""

    def __init__(self, *, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._tokenizers: dict[str, TextTokenizer] = {}

    def get(self, digest: str) -> TextTokenizer | None:
        return self._tokenizers.get(digest)

    async def load(self, digest: str, data: bytes) -> TextTokenizer:
        """The tokenizer in `data`. Raises ValueError when it is none."""
        parse = partial(Tokenizer.from_buffer, data)
        try:
            tokenizer = await asyncio.get_running_loop().run_in_executor(self._executor, parse)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return self._tokenizers.setdefault(digest, TextTokenizer(tokenizer, self._executor))

    def keep_only(self, digests: set[str]) -> None:
        """Forget the others."""
        self._tokenizers = {
            digest: tokenizer for digest, tokenizer in self._tokenizers.items() if digest in digests
        }

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
