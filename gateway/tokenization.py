"""Text to token ids with the `tokenizer.json` that a worker published. Knows neither HTTP nor Redis.

A short prompt is encoded on the event loop: it takes less time than the way to a thread and back. A long one goes to
a thread, where the tokenizer works without Python's lock.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json.encoder import encode_basestring as quote  # json.dumps(ensure_ascii=False), in C
from typing import TypeVar

from tokenizers import Encoding, Tokenizer

from common.errors import ValidationError
from gateway.galactica import mark_sequences, unmarked_places

PROMPT_STYLES = ("", "galactica")
INLINE_CHARACTERS = 1000  # at most 0.4 ms, with a token for every byte
_ROWS_AT_ONCE = 500  # a third of a millisecond
_PAUSE_S = 1e-4  # with less, the thread has Python's lock again before another woke

Result = TypeVar("Result")


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

    async def spans_json(
        self, text: str, *, last: int | None = None, adds_special_tokens: bool = True
    ) -> bytes:
        """Tokens with their places in `text` as TGI's JSON, or only the `last` of them.

        Added special tokens have no place. Raises ValidationError.
        """
        prepared = self._prepared(text)
        encode = partial(self._encode, prepared, adds_special_tokens=adds_special_tokens)
        place_of = unmarked_places(prepared) if prepared is not text else None
        write = partial(_written_spans, encode, text, place_of, last=last)
        return await self._called(write, num_characters=len(prepared))

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._tokenizer.id_to_token(id) or ""

    def _prepared(self, text: str) -> str:
        return mark_sequences(text) if self._prompt_style == "galactica" else text

    async def _encoding(self, text: str, *, adds_special_tokens: bool) -> Encoding:
        encode = partial(self._encode, text, adds_special_tokens=adds_special_tokens)
        return await self._called(encode, num_characters=len(text))

    def _encode(self, text: str, *, adds_special_tokens: bool) -> Encoding:
        """As a batch of one: `Tokenizer.encode` would hold Python's lock, also in a thread."""
        return self._tokenizer.encode_batch([text], add_special_tokens=adds_special_tokens)[0]

    async def _called(self, work: Callable[[], Result], *, num_characters: int) -> Result:
        """What `work` makes of a text, here or in a thread. Raises ValidationError."""
        try:
            if num_characters <= INLINE_CHARACTERS:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValidationError(f"Input validation error: tokenizer error {error}") from error


def _written_spans(
    encode: Callable[[], Encoding],
    text: str,
    place_of: Callable[[int], int] | None,
    *,
    last: int | None,
) -> bytes:
    """The rows of `TextTokenizer.spans_json`, made for a thread beside the event loop.

    Not a call here holds Python's lock for long, which `encoding.offsets` and json.dumps do with a million tokens, and
    between some rows it is laid down: the loop needs it back after every system call.
    """
    encoding = encode()
    ids, parts = encoding.ids, []
    numbers = range(len(ids))[-last:] if last else range(len(ids))
    for first in range(0, len(numbers), _ROWS_AT_ONCE):
        if first:
            time.sleep(_PAUSE_S)
        rows = []
        for number in numbers[first : first + _ROWS_AT_ONCE]:
            start, stop = encoding.token_to_chars(number) or (0, 0)
            if place_of:
                start, stop = place_of(start), place_of(stop)
            shown = quote(text[start:stop])
            rows.append(
                f'{{"id": {ids[number]}, "text": {shown}, "start": {start}, "stop": {stop}}}'
            )
        parts.append((", " * bool(first) + ", ".join(rows)).encode())
    return b"".join((b"[", *parts, b"]"))  # a join lets go of the lock, a sum does not


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
