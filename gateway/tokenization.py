"""Text to token ids with the `tokenizer.json` that a worker published. Knows neither HTTP nor Redis.

A short prompt is encoded on the event loop: it takes less time than the way to a thread and back. A long one goes to
a thread, where the tokenizer works without Python's lock.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tokenizers import Encoding, Tokenizer

from common.errors import ValidationError

INLINE_CHARACTERS = 2000  # about 0.2 ms


@dataclass(frozen=True, slots=True)
class Span:
    """A token of a text with its place in it, in characters."""

    id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """The tokenizer of one model."""

    def __init__(self, tokenizer: Tokenizer, executor: ThreadPoolExecutor) -> None:
        self._tokenizer = tokenizer
        self._executor = executor

    async def encode(self, text: str) -> list[int]:
        """Token ids, special tokens added. Raises ValidationError."""
        return (await self._encoding(text)).ids

    async def spans(self, text: str) -> list[Span]:
        """Tokens with their places in `text`; added special tokens have none. Raises ValidationError."""
        encoding = await self._encoding(text)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [Span(id, text[start:stop], start, stop) for id, (start, stop) in places]

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._tokenizer.id_to_token(id) or ""

    async def _encoding(self, text: str) -> Encoding:
        try:
            if len(text) <= INLINE_CHARACTERS:
                return self._tokenizer.encode(text)
            # encode() keeps Python's lock, encode_batch() gives it up
            encode = partial(self._tokenizer.encode_batch, [text])
            return (await asyncio.get_running_loop().run_in_executor(self._executor, encode))[0]
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
