"""From an OpenAI body to `GenerationRequest`s, or the first rule that it breaks, in OpenAI's field names.

Nothing behind this file checks user input again. Knows no HTTP.
"""

import asyncio
import secrets
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from common.messages import GenerationRequest, Sampling
from gateway.chat import ToolChoice, ToolUse, chat_prompt, tool_use_of
from gateway.grammar import require_valid
from gateway.input_limits import check_stored, check_vocabulary
from gateway.model_directory import ServedModel
from gateway.openai_parameters import check_chat, check_common, require, sampling_of, stopping_of
from gateway.response_format import grammar_of
from gateway.schemas.openai import ChatBody, CommonBody, CompletionBody
from gateway.settings import GatewaySettings

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
_SEED_STEP = 0x9E3779B97F4A7C15  # between the answers of one seed; odd, so that none comes twice


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the requests that answer it."""

    text: str  # what `echo` shows
    candidates: tuple[GenerationRequest, ...]


@dataclass(frozen=True, slots=True)
class ValidCall:
    """What a client asked, checked and resolved: requests to queue, and how to present the answers."""

    id: str  # of the HTTP request
    is_chat: bool
    prompts: tuple[Prompt, ...]
    num_answers: int  # to each prompt: the most likely of its candidates
    includes_usage: bool  # in the stream
    has_logprobs: bool
    echoes: bool = False
    drops_answer: bool = False  # `max_tokens` 0: only the prompt is scored
    tools: ToolUse = field(default_factory=ToolUse)
    num_characters: int = 0  # of the prompts that came as text
    keeps_special_tokens: bool = False  # in the text

    @property
    def requests(self) -> tuple[GenerationRequest, ...]:
        return tuple(chain.from_iterable(prompt.candidates for prompt in self.prompts))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.candidates[0].prompt_tokens) for prompt in self.prompts)

    def with_requests(self, requests: tuple[GenerationRequest, ...]) -> "ValidCall":
        """The same call with changed requests, in their order."""
        left = iter(requests)
        prompts = (
            replace(prompt, candidates=tuple(next(left) for _ in prompt.candidates))
            for prompt in self.prompts
        )
        return replace(self, prompts=tuple(prompts))


async def validate_completion(
    body: CompletionBody,
    model: ServedModel,
    settings: GatewaySettings,
    *,
    request_id: str,
    created_at: float = 0.0,
    traceparent: str = "",
) -> ValidCall:
    """Check a body of /v1/completions against a model. Raises ValidationError."""
    check_common(body, settings)
    require(not body.suffix, "`suffix` is not supported by this model; leave it out")
    num_logprobs, largest = body.logprobs or 0, settings.max_top_n_tokens
    require(0 <= num_logprobs <= largest, f"`logprobs` must be >= 0 and <= {largest}")
    echoes = bool(body.echo)
    require(
        not (echoes and num_logprobs),
        "`logprobs` > 0 with `echo` is not supported: alternatives of a prompt's tokens are not "
        "computed. Use `logprobs`: 0",
    )
    num_candidates = _num_candidates(body, settings)
    drops_answer = echoes and body.max_tokens == 0
    max_tokens = 1 if drops_answer else body.max_tokens
    texts, token_lists = await _prompts(body, model, settings)
    sampling = sampling_of(body, model.card, top_n_tokens=num_logprobs, grammar=None)
    requests = [
        GenerationRequest(
            id=request_id,
            model=model.name,
            prompt_tokens=tokens,
            sampling=sampling,
            stopping=stopping_of(
                body, model.card, len(tokens), max_tokens, default=_DEFAULT_MAX_TOKENS
            ),
            prompt_logprobs=echoes and body.logprobs is not None,
            priority=1 if body.priority is None else body.priority,
            created_at=created_at,
            deadline_s=settings.request_deadline_s,
            traceparent=traceparent,
        )
        for tokens in token_lists
    ]
    check_stored([(request, num_candidates) for request in requests])
    return ValidCall(
        id=request_id,
        is_chat=False,
        prompts=_multiplied(requests, texts, num_candidates, has_seed=body.seed is not None),
        num_answers=body.n or 1,
        includes_usage=_includes_usage(body),
        has_logprobs=body.logprobs is not None,
        num_characters=sum(len(entry) for entry in _entries(body) if isinstance(entry, str)),
        echoes=echoes,
        drops_answer=drops_answer,
        keeps_special_tokens=model.card.keeps_special_tokens,
    )


async def validate_chat(
    body: ChatBody,
    model: ServedModel,
    settings: GatewaySettings,
    *,
    request_id: str,
    created_at: float = 0.0,
    traceparent: str = "",
) -> ValidCall:
    """Check a body of /v1/chat/completions against a model. Raises ValidationError and TemplateError."""
    check_common(body, settings)
    check_chat(body, settings)
    tools = tool_use_of(body)
    grammar = tools.grammar() or grammar_of(body.response_format)
    require(
        grammar is None or tools.choice is not ToolChoice.AUTO,
        "`response_format` with `tools` needs a `tool_choice` other than `auto`",
    )
    if grammar is not None:
        await require_valid(grammar)
    text = await asyncio.to_thread(chat_prompt, body, model.card, tools)
    tokens = tuple(await model.tokenizer.encode(text, adds_special_tokens=False))
    require(bool(tokens), "`messages` must make at least one token")
    max_tokens = (
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    )
    request = GenerationRequest(
        id=request_id,
        model=model.name,
        prompt_tokens=tokens,
        sampling=sampling_of(
            body,
            model.card,
            top_n_tokens=body.top_logprobs or 0,
            grammar=grammar,
        ),
        stopping=stopping_of(body, model.card, len(tokens), max_tokens, default=None),
        priority=1 if body.priority is None else body.priority,
        created_at=created_at,
        deadline_s=settings.request_deadline_s,
        traceparent=traceparent,
    )
    check_vocabulary("messages", tokens, model)
    num_answers = body.n or 1
    check_stored([(request, num_answers)])
    return ValidCall(
        id=request_id,
        is_chat=True,
        prompts=_multiplied([request], [""], num_answers, has_seed=body.seed is not None),
        num_answers=num_answers,
        includes_usage=_includes_usage(body),
        has_logprobs=bool(body.logprobs),
        tools=tools,
        num_characters=len(text),
        keeps_special_tokens=model.card.keeps_special_tokens,
    )


def _includes_usage(body: CommonBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _num_candidates(body: CompletionBody, settings: GatewaySettings) -> int:
    num_answers, best_of = body.n or 1, body.best_of
    if best_of is None:
        return num_answers
    largest = max(settings.max_best_of, num_answers)
    require(
        num_answers <= best_of <= largest,
        f"`best_of` must be >= `n` and <= {largest}. Given: {best_of}",
    )
    require(
        best_of == num_answers or not body.stream, "`best_of` > `n` is not supported when streaming"
    )
    is_greedy = body.temperature == 0
    require(best_of == 1 or not is_greedy, "`best_of` > 1 needs a `temperature` above 0")
    return best_of


def _entries(body: CompletionBody) -> list[Any]:
    """The prompts, each a text or a list of token ids."""
    prompt = body.prompt
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    return [prompt] if is_one else list(prompt)


async def _prompts(
    body: CompletionBody, model: ServedModel, settings: GatewaySettings
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts, which only `echo` needs, and token ids."""
    given, most = _entries(body), settings.max_client_batch_size
    require(bool(given), "`prompt` cannot be an empty list")
    require(len(given) <= most, f"`prompt` takes up to {most} prompts. Given: {len(given)}")
    texts, token_lists = [], []
    for entry in given:
        is_text = isinstance(entry, str)
        tokens = tuple(await model.tokenizer.encode(entry) if is_text else entry)
        require(bool(tokens), "`prompt` must have at least one token")
        check_vocabulary("prompt", tokens, model)
        token_lists.append(tokens)
        if is_text:
            texts.append(entry)
        else:
            texts.append(model.tokenizer.decode(tokens) if body.echo else "")
    return texts, token_lists


def _multiplied(
    requests: list[GenerationRequest], texts: list[str], num_candidates: int, *, has_seed: bool
) -> tuple[Prompt, ...]:
    """Every prompt with its candidates, each under a seed and an id of its own."""
    is_single = len(requests) * num_candidates == 1
    prompts = []
    for place, (request, text) in enumerate(zip(requests, texts, strict=True)):
        first = place * num_candidates
        candidates = (
            replace(
                request,
                id=request.id if is_single else f"{request.id}-{first + number}",
                sampling=_with_seed(request.sampling, number, has_seed=has_seed),
            )
            for number in range(num_candidates)
        )
        prompts.append(Prompt(text, tuple(candidates)))
    return tuple(prompts)


def _with_seed(sampling: Sampling, number: int, *, has_seed: bool) -> Sampling:
    if not sampling.do_sample:
        return sampling
    if not has_seed:
        return replace(sampling, seed=secrets.randbits(64))
    return replace(sampling, seed=(sampling.seed + number * _SEED_STEP) % 2**64)
