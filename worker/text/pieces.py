"""What the single tokens of a tokenizer are: raw bytes, special names, texts.

Knows the `tokenizers` library and nothing of requests.
"""

import json
import re
from functools import cache

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """Facts about one tokenizer, worked out when first asked for and shared."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        kinds = _decoder_kinds(tokenizer)
        self.tokenizer = tokenizer
        self.special_tokens = frozenset(token for token, piece in added.items() if piece.special)
        self._is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_fallback = "ByteFallback" in kinds
        self._bytes: dict[int, bytes | None] = {}
        self._texts: dict[int, str] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token always stands for; None if only the decoder can tell."""
        try:
            return self._bytes[token]
        except KeyError:
            return self._bytes.setdefault(token, self._find_bytes(token))

    def text_of(self, token: int) -> str:
        """The text of a token by itself, as in the middle of a text; a special token's own name."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._find_text(token)
        return text

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def _find_bytes(self, token: int) -> bytes | None:
        piece = self.tokenizer.id_to_token(token)
        if piece is None:  # models pad their vocabulary; such ids have no text
            return b""
        if self._is_byte_level:
            table = _byte_level_table()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
            return piece.encode()  # an added token, which stands for itself
        match = _BYTE_TOKEN.fullmatch(piece) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def _find_text(self, token: int) -> str:
        if token in self.special_tokens:
            return self.tokenizer.id_to_token(token)
        data = self.bytes_of(token)
        if data is not None:
            return data.decode(errors="replace")
        # The second of two has the space that a decoder strips from the beginning of a text.
        first = self.decode([token])
        return self.decode([token, token])[len(first) :]


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The types in a tokenizer's decoder, in order; a sequence is spelled out."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return [part["type"] for part in parts]


@cache
def _byte_level_table() -> dict[str, int]:
    """The byte of each printable character in byte-level BPE (GPT-2, Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, the others are 256, 257, ... in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
