"""Whole answers in OpenAI's JSON, and what `openai_stream.py` shares with them. Pure functions.

choice      the text of one request, of which a call may have many
id          `chatcmpl-` or `cmpl-` and the id of the HTTP request
logprobs    of the tokens that are shown; the spelling is what a token added to the text
stop text   cut by the worker, so that nothing here has to look for it
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.messages import Finish, FinishReason, GenerationRequest, Token, TopToken
from gateway.chat import ToolChoice
from gateway.generation import Completion
from gateway.openai_logprobs import chat_logprob, completion_logprobs
from gateway.openai_validation import ValidCall
from gateway.tool_calls import CALL_TOKENS, Arguments, CallBegins, Content, Piece


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer and chunk of a call repeats."""

    id: str
    created: int  # Unix time in seconds
    model: str
    fingerprint: str

    def members(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def envelope_of(call: ValidCall, *, fingerprint: str) -> Envelope:
    request = call.requests[0]
    prefix = "chatcmpl" if call.is_chat else "cmpl"
    return Envelope(f"{prefix}-{call.id}", int(request.created_at), request.model, fingerprint)


def answer_json(call: ValidCall, envelope: Envelope, answers: Sequence[Completion]) -> str:
    """The body of an answer in one piece. `answers` are those of all candidates, in the order of `call.requests`."""
    left, choices = iter(answers), []
    for prompt in call.prompts:
        candidates = [next(left) for _ in prompt.candidates]
        if len(candidates) > call.num_answers:
            candidates.sort(key=lambda answer: answer.mean_logprob, reverse=True)
        for answer in candidates[: call.num_answers]:
            make = _chat_choice if call.is_chat else _completion_choice
            choices.append(make(call, len(choices), answer, prompt.text))
    usage = usage_of(call, [answer.finish for answer in answers])
    kind = "chat.completion" if call.is_chat else "text_completion"
    return dumps({**envelope.members(kind), "choices": choices, "usage": usage})


def usage_of(call: ValidCall, finishes: Sequence[Finish]) -> dict[str, Any]:
    """Token counts over all candidates; a prompt counts once."""
    answered = 0 if call.drops_answer else sum(finish.generated_tokens for finish in finishes)
    firsts, place = [], 0
    for prompt in call.prompts:
        firsts.append(finishes[place])
        place += len(prompt.candidates)
    return {
        "prompt_tokens": call.num_prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": call.num_prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": sum(first.cached_tokens for first in firsts)},
    }


@dataclass(slots=True)
class _Message:
    """The pieces of an answer, put together."""

    content: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        match piece:
            case Content(text):
                self.content.append(text)
            case CallBegins(name):
                self.calls.append((name, []))
            case Arguments(text):
                self.calls[-1][1].append(text)


def _chat_choice(call: ValidCall, index: int, answer: Completion, prompt: str) -> dict[str, Any]:
    reader, message = call.tools.reader(), _Message()
    shown = shown_tokens(call, answer.tokens, with_call_tokens=reader is not None)
    text = "".join(token.text for token in shown)
    pieces = [Content(text)] if reader is None else [*reader.push(text), *reader.finish()]
    for piece in pieces:
        message.add(piece)
    body: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(message.content) or (None if message.calls else ""),
        "refusal": None,
    }
    if message.calls:
        body["tool_calls"] = [
            call_json(answer.request, number, name, "".join(arguments))
            for number, (name, arguments) in enumerate(message.calls)
        ]
    logprobs = None
    if call.has_logprobs:
        logprobs = {"content": [chat_logprob(token) for token in shown], "refusal": None}
    reason = chat_finish_reason(call, answer.finish.reason, has_calls=bool(message.calls))
    return {"index": index, "message": body, "logprobs": logprobs, "finish_reason": reason}


def message_text(call: ValidCall, answer: Completion) -> str:
    """The answer to a chat as one text: its content, or the calls as JSON."""
    message = _chat_choice(call, 0, answer, "")["message"]
    return message["content"] if message["content"] is not None else dumps(message["tool_calls"])


def _completion_choice(
    call: ValidCall, index: int, answer: Completion, prompt: str
) -> dict[str, Any]:
    tokens: list[Token | TopToken] = []
    text = ""
    if call.echoes:
        text = prompt
        tokens += shown_tokens(call, answer.prompt)
    if not call.drops_answer:
        answered = shown_tokens(call, answer.tokens)
        text += "".join(token.text for token in answered)
        tokens += answered
    logprobs = completion_logprobs(answer.request, tokens, 0) if call.has_logprobs else None
    reason = finish_reason(answer.finish.reason)
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def shown_tokens(
    call: ValidCall,
    tokens: Sequence[Token] | Sequence[TopToken],
    *,
    with_call_tokens: bool = False,
) -> list[Any]:
    """The tokens that belong to the text."""
    if call.keeps_special_tokens:
        return list(tokens)
    return [
        token
        for token in tokens
        if not token.is_special or (with_call_tokens and token.text in CALL_TOKENS)
    ]


def finish_reason(reason: FinishReason) -> str:
    return "length" if reason is FinishReason.LENGTH else "stop"


def chat_finish_reason(call: ValidCall, reason: FinishReason, *, has_calls: bool) -> str:
    """As at OpenAI, a function that the client named ends with `stop`."""
    if (
        has_calls
        and reason is not FinishReason.LENGTH
        and call.tools.choice is not ToolChoice.NAMED
    ):
        return "tool_calls"
    return finish_reason(reason)


def call_json(request: GenerationRequest, number: int, name: str, arguments: str) -> dict[str, Any]:
    """The id is nine characters, as Mistral's templates ask for, and the same when a stream is read again."""
    id = hashlib.blake2b(f"{request.id}/{number}".encode(), digest_size=5).hexdigest()[:9]
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
