"""From a parsed body to `GenerationRequest`s, or the first rule that it breaks, in TGI's order and words.

Nothing behind this file checks user input again: not the queue, not the worker.
"""

import secrets
from dataclasses import dataclass, replace

from common.errors import ValidationError
from common.messages import GenerationRequest, Grammar, ModelCard, Sampling, Stopping
from gateway.grammar import checked_grammar
from gateway.input_limits import (
    check_stops,
    check_stored,
    check_vocabulary,
    checked_logit_bias,
)
from gateway.model_directory import ServedModel
from gateway.schemas.native import GenerateBody, GenerateParameters
from gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class ValidGeneration:
    """What a client asked, checked and resolved: the requests to queue and how to present the answer.

    More than one request means `best_of`: the same prompt under different seeds.
    """

    requests: tuple[GenerationRequest, ...]
    has_details: bool
    prefix: str  # put before the generated text: the prompt for `return_full_text`, else empty
    num_characters: int  # of the prompt
    keeps_special_tokens: bool = False  # in the generated text

    @property
    def request(self) -> GenerationRequest:
        return self.requests[0]

    @property
    def id(self) -> str:
        """The id that the client sees."""
        return self.request.id.partition("-")[0]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_tokens)


async def validate(
    body: GenerateBody,
    model: ServedModel,
    settings: GatewaySettings,
    *,
    request_id: str,
    is_stream: bool = False,
    returns_full_text: bool = False,
    created_at: float = 0.0,
    traceparent: str = "",
) -> ValidGeneration:
    """Check a body against a model.

    Args:
        request_id: unique for ever: the queue takes an id only once.
        returns_full_text: what an absent `return_full_text` means on this route.

    Raises ValidationError with the rule, the value and TGI's message.
    """
    parameters, card = body.parameters, model.card
    _check_supported(parameters)
    _check_route(parameters, settings, is_stream=is_stream)
    _check_parameters(parameters, settings)
    _require(bool(body.inputs), "`inputs` cannot be empty")
    prompt = await _prompt_tokens(body, model)
    stopping = _stopping(parameters, card, num_prompt_tokens=len(prompt))
    check_vocabulary("inputs", prompt, model)
    bias = checked_logit_bias(parameters.logit_bias, card)
    grammar = await checked_grammar(parameters.grammar)
    request = GenerationRequest(
        id=request_id,
        model=card.model,
        prompt_tokens=prompt,
        sampling=_sampling(parameters, bias, grammar),
        stopping=stopping,
        prompt_logprobs=parameters.decoder_input_details,
        priority=1 if body.priority is None else body.priority,
        created_at=created_at,
        deadline_s=settings.request_deadline_s,
        traceparent=traceparent,
    )
    is_full = (
        returns_full_text if parameters.return_full_text is None else parameters.return_full_text
    )
    prefix = body.inputs if is_full else ""
    sequences = _sequences(request, parameters.best_of or 1)
    check_stored([(request, len(sequences))], num_more_bytes=len(sequences) * len(prefix))
    return ValidGeneration(
        requests=sequences,
        has_details=parameters.details or parameters.decoder_input_details,
        prefix=prefix,
        num_characters=len(body.inputs),
        keeps_special_tokens=card.keeps_special_tokens,
    )


def _require(is_met: bool, rule: str) -> None:
    if not is_met:
        raise ValidationError(f"Input validation error: {rule}")


def _check_supported(parameters: GenerateParameters) -> None:
    """What TGI has and we have not is refused by name, never ignored."""
    _require(parameters.adapter_id is None, "`adapter_id` is not supported; leave it out")


def _check_route(
    parameters: GenerateParameters, settings: GatewaySettings, *, is_stream: bool
) -> None:
    best_of, largest = parameters.best_of or 1, settings.max_best_of
    if is_stream:
        _require(best_of == 1, "`best_of` != 1 is not supported when streaming tokens")
        _require(
            not parameters.decoder_input_details,
            "`decoder_input_details` == true is not supported when streaming tokens",
        )
    if best_of != 1 and largest == 1:
        _require(False, "`best_of` != 1 is not allowed for this endpoint")
    _require(
        1 <= best_of <= largest,
        f"`best_of` must be > 0 and <= {largest}. Given: {parameters.best_of}",
    )


def _check_parameters(given: GenerateParameters, settings: GatewaySettings) -> None:
    best_of = given.best_of or 1
    warpers = (given.temperature, given.top_k, given.top_p, given.typical_p, given.min_p)
    is_sampling = given.do_sample or any(value is not None for value in warpers)
    _require(best_of == 1 or is_sampling, "you must use sampling when `best_of` is > 1")
    _require(
        given.temperature is None or given.temperature > 0,
        "`temperature` must be strictly positive",
    )
    _require(
        given.repetition_penalty is None or given.repetition_penalty > 0,
        "`repetition_penalty` must be strictly positive",
    )
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(given, name)
        _require(value is None or -2.0 <= value <= 2.0, f"`{name}` must be >= -2.0 and <= 2.0")
    for name in ("top_p", "typical_p"):
        value = getattr(given, name)
        _require(value is None or 0.0 < value < 1.0, f"`{name}` must be > 0.0 and < 1.0")
    _require(given.min_p is None or 0.0 <= given.min_p <= 1.0, "`min_p` must be >= 0.0 and <= 1.0")
    _require(given.top_k is None or given.top_k > 0, "`top_k` must be strictly positive")
    _require(
        given.max_new_tokens is None or given.max_new_tokens > 0,
        "`max_new_tokens` must be strictly positive",
    )
    num_stops, most_stops = len(given.stop), settings.max_stop_sequences
    _require(
        num_stops <= most_stops,
        f"`stop` supports up to {most_stops} stop sequences. Given: {num_stops}",
    )
    check_stops(given.stop)
    _require(best_of == 1 or given.seed is None, "`seed` must not be set when `best_of` > 1")
    largest = settings.max_top_n_tokens
    _require(
        given.top_n_tokens is None or 0 <= given.top_n_tokens <= largest,
        f"`top_n_tokens` must be >= 0 and <= {largest}. Given: {given.top_n_tokens}",
    )


async def _prompt_tokens(body: GenerateBody, model: ServedModel) -> tuple[int, ...]:
    truncate, largest = body.parameters.truncate, model.card.max_input_tokens
    _require(
        truncate is None or 0 < truncate <= largest,
        f"`truncate` must be strictly positive and less than {largest}. Given: {truncate}",
    )
    tokens = await model.tokenizer.encode(body.inputs)
    _require(bool(tokens), "`inputs` must have at least one token")
    return tuple(tokens if truncate is None else tokens[-truncate:])


def _stopping(given: GenerateParameters, card: ModelCard, *, num_prompt_tokens: int) -> Stopping:
    largest_total, largest_input = card.max_total_tokens, card.max_input_tokens
    max_new_tokens = given.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(0, largest_total - num_prompt_tokens)
    _require(
        num_prompt_tokens + max_new_tokens <= largest_total,
        f"`inputs` tokens + `max_new_tokens` must be <= {largest_total}. "
        f"Given: {num_prompt_tokens} `inputs` tokens and {max_new_tokens} `max_new_tokens`",
    )
    _require(
        num_prompt_tokens <= largest_input,
        f"`inputs` must have less than {largest_input} tokens. Given: {num_prompt_tokens}",
    )
    min_new_tokens = given.min_new_tokens or 0
    _require(
        0 <= min_new_tokens <= max_new_tokens,
        f"`min_new_tokens` must be >= 0 and <= {max_new_tokens}. Given: {min_new_tokens}",
    )
    return Stopping(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=tuple(given.stop),
        include_stop=given.include_stop is not False,
        ignore_eos=given.ignore_eos_token,
    )


def _sampling(
    given: GenerateParameters, bias: tuple[tuple[int, float], ...], grammar: Grammar | None
) -> Sampling:
    """Any rule that only makes sense with sampling turns it on, as in TGI; `min_p` is one of them."""
    does_sample = (
        given.do_sample
        or given.temperature not in (None, 1.0)
        or given.top_k is not None
        or given.top_p is not None
        or given.typical_p is not None
        or bool(given.min_p)
        or (given.best_of or 1) > 1
    )
    seed = given.seed
    if seed is None:
        seed = secrets.randbits(64) if does_sample else 0
    return Sampling(
        do_sample=does_sample,
        temperature=1.0 if given.temperature is None else given.temperature,
        top_k=given.top_k or 0,
        top_p=1.0 if given.top_p is None else given.top_p,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        min_p=given.min_p or 0.0,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        frequency_penalty=given.frequency_penalty or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        logit_bias=bias,
        seed=seed,
        top_n_tokens=given.top_n_tokens or 0,
        watermark=given.watermark,
        grammar=grammar,
    )


def _sequences(request: GenerationRequest, best_of: int) -> tuple[GenerationRequest, ...]:
    if best_of == 1:
        return (request,)
    return tuple(
        replace(
            request,
            id=f"{request.id}-{number}",
            sampling=replace(request.sampling, seed=secrets.randbits(64)),
        )
        for number in range(best_of)
    )
