"""The parameters that OpenAI's bodies share: their rules, and what they are for the workers. Knows no HTTP."""

import secrets
from typing import Any, NoReturn

from common.errors import ValidationError
from common.messages import Grammar, ModelCard, Sampling, Stopping
from gateway.input_limits import check_stops, checked_logit_bias
from gateway.openai_errors import ContextLengthExceeded
from gateway.schemas.openai import ChatBody, CommonBody
from gateway.settings import GatewaySettings

_MOST_ANSWERS = 128  # OpenAI's limit of `n`
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "functions": ([],),
}


def require(is_met: bool, rule: str) -> None:
    if not is_met:
        refuse(rule)


def refuse(rule: str) -> NoReturn:
    raise ValidationError(f"Input validation error: {rule}", param=rule.split("`")[1])


def check_common(body: CommonBody, settings: GatewaySettings) -> None:
    ranges = (
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("frequency_penalty", -2.0, 2.0),
        ("presence_penalty", -2.0, 2.0),
        ("min_p", 0.0, 1.0),
        ("n", 1, _MOST_ANSWERS),
    )
    for name, smallest, largest in ranges:
        value = getattr(body, name)
        require(
            value is None or smallest <= value <= largest,
            f"`{name}` must be >= {smallest} and <= {largest}. Given: {value}",
        )
    require(
        body.repetition_penalty is None or body.repetition_penalty > 0,
        f"`repetition_penalty` must be strictly positive. Given: {body.repetition_penalty}",
    )
    require(body.top_k is None or body.top_k >= -1, f"`top_k` must be >= -1. Given: {body.top_k}")
    require(
        body.stream_options is None or bool(body.stream),
        "`stream_options` needs `stream`: true; leave it out",
    )
    stops, most = stops_of(body), settings.max_stop_sequences
    require(len(stops) <= most, f"`stop` takes up to {most} texts. Given: {len(stops)}")
    check_stops(stops)


def check_chat(body: ChatBody, settings: GatewaySettings) -> None:
    for name, declared in ChatBody.model_fields.items():
        extra = declared.json_schema_extra
        is_unsupported = isinstance(extra, dict) and "deprecated" in extra
        value = getattr(body, name)
        if is_unsupported and value is not None and value not in _NEUTRAL.get(name, ()):
            refuse(f"`{name}` is not supported; leave it out")
    both = (body.max_tokens, body.max_completion_tokens)
    require(
        None in both or both[0] == both[1],
        "`max_tokens` and `max_completion_tokens` are the same; set one of them",
    )
    largest, top = settings.max_top_logprobs, body.top_logprobs or 0
    require(0 <= top <= largest, f"`top_logprobs` must be >= 0 and <= {largest}. Given: {top}")
    require(not top or bool(body.logprobs), "`top_logprobs` needs `logprobs`: true")


def stops_of(body: CommonBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def stopping_of(
    body: CommonBody,
    card: ModelCard,
    num_prompt: int,
    max_tokens: int | None,
    *,
    default: int | None,
) -> Stopping:
    left = card.max_total_tokens - num_prompt
    if num_prompt > card.max_input_tokens or left < (max_tokens or 1):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {card.max_total_tokens} tokens, of which a "
            f"prompt may have {card.max_input_tokens}. However, you requested "
            f"{num_prompt + (max_tokens or 1)} tokens ({num_prompt} in the prompt, "
            f"{max_tokens or 1} in the completion). Please reduce the length of either one.",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    if max_tokens is None:
        max_tokens = left if default is None else min(default, left)
    require(max_tokens > 0, f"`max_tokens` must be strictly positive. Given: {max_tokens}")
    min_tokens = body.min_tokens or 0
    require(
        0 <= min_tokens <= max_tokens,
        f"`min_tokens` must be >= 0 and <= {max_tokens}. Given: {min_tokens}",
    )
    return Stopping(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        stop=stops_of(body),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
    )


def sampling_of(
    body: CommonBody, card: ModelCard, *, top_n_tokens: int, grammar: Grammar | None
) -> Sampling:
    """OpenAI's defaults: it samples at temperature 1; 0, like a `top_p` of 0, is greedy decoding."""
    temperature = 1.0 if body.temperature is None else body.temperature
    does_sample = temperature > 0 and body.top_p != 0
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    return Sampling(
        do_sample=does_sample,
        temperature=temperature if does_sample else 1.0,
        top_k=max(0, body.top_k or 0),
        top_p=body.top_p or 1.0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=checked_logit_bias(body.logit_bias, card),
        seed=seed if does_sample else 0,
        top_n_tokens=top_n_tokens,
        grammar=grammar,
    )
