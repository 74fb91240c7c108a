"""How much of everything a request may bring, whatever route it takes. Knows no bodies and no HTTP.

All raise ValidationError with the rule, the value and the way out. A worker and the broker pay for what is let in here:
a stop sequence is looked for with every token, and every sequence of a request is stored whole.
"""

from collections.abc import Mapping, Sequence

from common.codec import encode
from common.errors import ValidationError
from common.messages import GenerationRequest, ModelCard
from gateway.model_directory import ServedModel

LONGEST_STOP = 1000  # in characters
MOST_BIASES = 1024
MOST_STORED_BYTES = 16_000_000  # of all sequences of a request together


def check_stops(given: Sequence[str]) -> None:
    """Refuse stop sequences that are empty or too long."""
    _require("" not in given, "`stop` must not contain an empty text", param="stop")
    longest = max(map(len, given), default=0)
    _require(
        longest <= LONGEST_STOP,
        f"`stop` takes texts of up to {LONGEST_STOP} characters. Given: one of {longest}",
        param="stop",
    )


def check_vocabulary(name: str, tokens: Sequence[int], model: ServedModel) -> None:
    """Refuse tokens that the model has not: its tokenizer may have more, as where `<pad>` was added to it alone."""
    size = model.card.vocab_size
    if max(tokens) < size:
        return
    wrong = next(token for token in tokens if token >= size)
    text = model.tokenizer.token(wrong)[:100]
    shown = f"{wrong}, which is `{text}`" if text else str(wrong)
    _require(
        False,
        f"`{name}` takes token ids below {size}, the size of the model's vocabulary. "
        f"Given: {shown}; leave it out",
        param=name,
    )


def check_stored(
    prompts: Sequence[tuple[GenerationRequest, int]], *, num_more_bytes: int = 0
) -> None:
    """Refuse what would fill the broker.

    Args:
        prompts: one request of each prompt, and how many there are that differ only in id and seed.
        num_more_bytes: what is stored besides.
    """
    if sum(number for _, number in prompts) == 1:
        return  # no longer than its body, which has a limit
    stored = num_more_bytes + sum(len(encode(request)) * number for request, number in prompts)
    _require(
        stored <= MOST_STORED_BYTES,
        f"all sequences of a request may take {MOST_STORED_BYTES} bytes, each with a prompt, "
        f"`stop`, `logit_bias` and grammar of its own. Given: {stored}; ask for fewer at once",
        param=None,
    )


def checked_logit_bias(
    given: Mapping[str, float] | None, card: ModelCard
) -> tuple[tuple[int, float], ...]:
    """Token ids and what is added to their logits."""
    num_given, bias = len(given or {}), {}
    _require_bias(num_given <= MOST_BIASES, f"takes up to {MOST_BIASES} tokens. Given: {num_given}")
    for text, value in (given or {}).items():
        is_token = text.isascii() and text.isdigit() and len(text) < 10
        _require_bias(
            is_token and int(text) < card.vocab_size,
            f"takes token ids >= 0 and < {card.vocab_size}. Given: {text[:20]}",
        )
        token = int(text)
        _require_bias(token not in bias, f"takes each token once. Given: {token} again, as {text}")
        _require_bias(
            -100.0 <= value <= 100.0, f"values must be >= -100.0 and <= 100.0. Given: {value}"
        )
        bias[token] = value
    return tuple(bias.items())


def _require_bias(is_met: bool, rule: str) -> None:
    _require(is_met, f"`logit_bias` {rule}", param="logit_bias")


def _require(is_met: bool, rule: str, *, param: str | None) -> None:
    if not is_met:
        raise ValidationError(f"Input validation error: {rule}", param=param)
