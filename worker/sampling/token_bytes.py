"""The bytes of each token of a SentencePiece tokenizer whose decoder is Metaspace (T5, mT5), in the
shape in which llguidance takes them. It reads the other kinds by itself."""

import json
from collections.abc import Sequence

from llguidance import TokenizerWrapper
from tokenizers import Tokenizer


def has_metaspace_decoder(tokenizer_json: str) -> bool:
    """Whether this is the kind of tokenizer that needs the wrapper."""
    return [part.get("type") for part in _decoders(tokenizer_json)] == ["Metaspace"]


def wrapped_tokenizer(tokenizer_json: str, eos_tokens: Sequence[int]) -> TokenizerWrapper:
    """The tokenizer for llguidance."""
    space = _decoders(tokenizer_json)[0]["replacement"]
    unknown = json.loads(tokenizer_json)["model"].get("unk_id")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return TokenizerWrapper(_TokenBytes(tokenizer, space, unknown, eos_tokens[0]))


class _TokenBytes:
    """What llguidance asks of a tokenizer: bytes by token, special tokens, and a way to encode."""

    def __init__(
        self, tokenizer: Tokenizer, space: str, unknown: int | None, eos_token: int
    ) -> None:
        added = tokenizer.get_added_tokens_decoder()
        num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        names = [tokenizer.id_to_token(token) or "" for token in range(num_tokens)]
        self._model = tokenizer.model
        self._space = space
        self._unknown = unknown
        self.eos_token_id = eos_token
        self.bos_token_id = None
        self.special_token_ids = [token for token, piece in added.items() if piece.special]
        self.tokens = [
            (name if token in added else name.replace(space, " ")).encode()
            for token, name in enumerate(names)
        ]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")  # this is how llguidance finds out
        # The model itself, because the tokenizer would put a space before the text.
        tokens = [piece.id for piece in self._model.tokenize(text.replace(" ", self._space))]
        is_known = self._unknown not in tokens  # what the vocabulary cannot spell has no tokens
        return tokens if is_known else tokens[: tokens.index(self._unknown)]


def _decoders(tokenizer_json: str) -> list[dict]:
    decoder = json.loads(tokenizer_json).get("decoder") or {}
    return decoder.get("decoders", [decoder])
