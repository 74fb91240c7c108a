"""Log-probabilities in OpenAI's two shapes. Pure functions.

A token is spelled as the text that it added to the answer, so that the spellings make up the text.
"""

import math
from collections.abc import Sequence
from typing import Any

from common.messages import GenerationRequest, Token, TopToken

_NEVER = -9999.0  # OpenAI's log-probability of what is as good as impossible


def chat_logprob(token: Token) -> dict[str, Any]:
    top = [_spelled(_text_of(other, token), other.logprob) for other in token.top]
    return {**_spelled(token.text, token.logprob), "top_logprobs": top}


def _spelled(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def completion_logprobs(
    request: GenerationRequest, tokens: Sequence[Token | TopToken], offset: int
) -> dict[str, Any]:
    """OpenAI's older shape: lists of equal length. Offsets count characters of the choice's text."""
    offsets, num_top = [], request.sampling.top_n_tokens
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    tops = [_top_of(token) for token in tokens] if num_top else None
    return {
        "text_offset": offsets,
        "token_logprobs": [
            None if token.logprob is None else _finite(token.logprob) for token in tokens
        ],
        "tokens": [token.text for token in tokens],
        "top_logprobs": tops,
    }


def _top_of(token: Token | TopToken) -> dict[str, float] | None:
    if isinstance(token, TopToken):
        return None
    return {
        **{_text_of(other, token): _finite(other.logprob) for other in token.top},
        token.text: _finite(token.logprob),
    }


def _text_of(other: TopToken, chosen: Token) -> str:
    """An alternative's text; the chosen token is spelled as in the answer."""
    return chosen.text if other.id == chosen.id else other.text


def _finite(logprob: float | None) -> float:
    """Eight digits are all that 32 bits hold."""
    if logprob is None or not math.isfinite(logprob):
        return _NEVER
    return float(f"{logprob:.8g}")
