"""Incremental decode: the text that each token adds, never half a character.

Deterministic in the token ids alone, so that another worker that replays them gets the same parts.
"""

import codecs
from collections.abc import Sequence

import tokenizers

from worker.text.pieces import Pieces

_MAX_HELD_TOKENS = 8
_MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one sequence, token by token, as the continuation of its prompt.

    All texts together are `decode(prompt + output)` less `decode(prompt)` (a character that the
    prompt leaves open is told whole), with this rule for bytes that are not UTF-8: each maximal
    invalid part becomes one U+FFFD (Unicode 16, section 3.9), as soon as it is known to be invalid,
    and what was valid stays. Byte-level tokenizers decode just so. Those with byte fallback replace
    a whole run of byte tokens, valid characters included, if any of it is invalid; a stream cannot,
    having sent them.

    Tokens go one of two ways:

        bytes   byte-level BPE, and the <0xNN> tokens of byte fallback: an incremental UTF-8
                decoder, which holds three bytes at most
        pieces  everything else: decode(context + held) less decode(context), where the context is
                the token (or group) told before; it keeps the space that decoders strip from the
                beginning of a text. At most 7 tokens are held while the text ends in U+FFFD

                 ... ▁Hel lo | ▁wor  ld        context: lo     held: ▁wor     adds: " wor"
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        prompt_tokens: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        pieces: Pieces | None = None,
    ) -> None:
        """`prompt_tokens` is what the text continues; an encoder-decoder model's text stands alone.

        `pieces` are the facts about this tokenizer, to share between sequences; None finds them out
        again.
        """
        self._pieces = pieces or Pieces(tokenizer)
        self._hidden = self._pieces.special_tokens if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_bytes = False
        self._context: list[int] = []
        self._held: list[int] = []
        for token in self._last_visible(prompt_tokens):
            self.push(token)  # its text is the prompt's: dropped
        self._flush_pieces()

    def push(self, token: int) -> str:
        """The text that `token` adds: empty while bytes of a character are missing, and for a
        special token.
        """
        if token in self._hidden:
            return ""
        data = self._pieces.bytes_of(token)
        if data is None or (
            data == b" " and not self._context
        ):  # a decoder may strip a first space
            return self._flush_bytes() + self._push_piece(token)
        text = self._flush_pieces() if self._held else ""
        self._has_bytes = True
        self._context = [token]
        return text + self._utf8.decode(data)

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        return self._flush_bytes() + self._flush_pieces()

    def _push_piece(self, token: int) -> str:
        self._held.append(token)
        before = self._pieces.decode(self._context)
        after = self._pieces.decode(self._context + self._held)
        if after.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""  # of a decoder that we do not know: perhaps the beginning of a character
        return self._settle(before, after)

    def _settle(self, before: str, after: str) -> str:
        """What `after` adds to `before`; the held tokens become the context."""
        held = self._held
        self._context, self._held = held, []
        if not after.startswith(before):  # the prompt left a character open, and it is whole now
            before = before.rstrip(_REPLACEMENT)
        if after.startswith(before):
            return after[len(before) :]
        return self._pieces.decode(held)  # the decoder changed its mind: what is shown is shown

    def _flush_pieces(self) -> str:
        if not self._held:
            return ""
        before = self._pieces.decode(self._context)
        return self._settle(before, self._pieces.decode(self._context + self._held))

    def _flush_bytes(self) -> str:
        if not self._has_bytes:
            return ""
        self._has_bytes = False
        return self._utf8.decode(b"", final=True)

    def _last_visible(self, prompt_tokens: Sequence[int]) -> list[int]:
        """The end of the prompt: enough to know that the text has begun, and a character that it
        leaves open.
        """
        last: list[int] = []
        for token in reversed(prompt_tokens):
            if len(last) == _MAX_CHARACTER_TOKENS:
                break
            if token not in self._hidden:
                last.append(token)
        return last[::-1]
