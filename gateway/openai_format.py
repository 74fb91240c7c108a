"""Frames to OpenAI's JSON: answers, chunks and `data: [DONE]`. Pure functions, and lean: one runs per token.

choice      the text of one request, of which a call may have many; they stream side by side
id          `chatcmpl-` or `cmpl-` and the id of the HTTP request
logprobs    of the tokens that are shown; the spelling is what a token added to the text
stop text   cut by the worker, so that nothing here has to look for it
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.messages import Finish, FinishReason, Frame, GenerationRequest, Token, TopToken
from gateway.chat import ToolChoice
from gateway.generation import Completion
from gateway.native_format import quote
from gateway.openai_validation import ValidCall
from gateway.tool_calls import CALL_TOKENS, Arguments, CallBegins, Content, Piece

DONE = "data: [DONE]\n\n"
_NEVER = -9999.0  # OpenAI's log-probability of what is as good as impossible


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
    return _dumps({**envelope.members(kind), "choices": choices, "usage": usage})


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


class StreamFormat:
    """Writes the events of one call. Events have ids, as on the native routes, where there is only one choice."""

    def __init__(
        self, call: ValidCall, envelope: Envelope, requests: Sequence[GenerationRequest]
    ) -> None:
        kind = "chat.completion.chunk" if call.is_chat else "text_completion"
        self._head = f"data: {_dumps(envelope.members(kind))[:-1]}"
        usage = ',"usage":null' if call.includes_usage else ""
        self._call = call
        self._has_ids = len(requests) == 1
        self._finishes: dict[int, Finish] = {}
        texts = [prompt.text for prompt in call.prompts for _ in prompt.candidates]
        self._choices = [
            (_ChatStream if call.is_chat else _CompletionStream)(
                call,
                request,
                f'{self._head},"choices":[{{"index":{index},',
                f"]{usage}}}\n\n",
                text,
            )
            for index, (request, text) in enumerate(zip(requests, texts, strict=True))
        ]

    def events(self, index: int, frame_index: int, frame: Frame) -> bytes:
        """The events of one frame of one choice, ready for the wire. The last choice's end is the stream's."""
        choice = self._choices[index]
        events = choice.events(frame)
        if frame.finish is not None:
            self._finishes[index] = frame.finish
            if len(self._finishes) == len(self._choices):
                events += self._end()
        if not events:
            return b""
        if self._has_ids:
            # only the last has the id: a client that comes back with it has seen the whole frame
            request_id = choice.request.id
            events[-1] = f"id: {request_id}:{frame_index}-{frame.chain.hex()}\n{events[-1]}"
        return "".join(events).encode()

    def _end(self) -> list[str]:
        if not self._call.includes_usage:
            return [DONE]
        finishes = [self._finishes[index] for index in range(len(self._choices))]
        usage = _dumps(usage_of(self._call, finishes))
        return [f'{self._head},"choices":[],"usage":{usage}}}\n\n', DONE]


@dataclass(slots=True)
class _CompletionStream:
    """One choice of /v1/completions."""

    call: ValidCall
    request: GenerationRequest
    head: str
    tail: str
    prompt: str
    _is_begun: bool = False
    _offset: int = 0

    def events(self, frame: Frame) -> list[str]:
        tokens: list[Token | TopToken] = []
        text = ""
        if not self._is_begun:
            self._is_begun = True
            if self.call.echoes:
                text = self.prompt
                tokens += _shown(self.call, frame.prompt)
        if not self.call.drops_answer:
            answered = _shown(self.call, frame.tokens)
            text += "".join(token.text for token in answered)
            tokens += answered
        finish = _finish_reason(frame.finish.reason) if frame.finish else None
        if not text and finish is None and not (tokens and self.call.has_logprobs):
            return []
        logprobs = "null"
        if self.call.has_logprobs:
            logprobs = _dumps(_completion_logprobs(self.request, tokens, self._offset))
        self._offset += len(text)
        reason = "null" if finish is None else f'"{finish}"'
        members = f'"text":{quote(text)},"logprobs":{logprobs},"finish_reason":{reason}'
        return [f"{self.head}{members}}}{self.tail}"]


class _ChatStream:
    """One choice of /v1/chat/completions."""

    __slots__ = (
        "_call",
        "_calls",
        "_head",
        "_is_begun",
        "_logprobs",
        "_reader",
        "_tail",
        "request",
    )

    def __init__(
        self, call: ValidCall, request: GenerationRequest, head: str, tail: str, prompt: str
    ) -> None:
        self.request = request
        self._call = call
        self._head, self._tail = head, tail
        self._reader = call.tools.reader()
        self._is_begun = False
        self._calls = 0
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is held back

    def events(self, frame: Frame) -> list[str]:
        events = []
        if not self._is_begun:
            self._is_begun = True
            events.append(self._event('"role":"assistant","content":""'))
        has_calls = self._reader is not None
        shown = _shown(self._call, frame.tokens, with_call_tokens=has_calls)
        if self._call.has_logprobs:
            self._logprobs += map(_chat_logprob, shown)
        text = "".join(token.text for token in shown)
        if self._reader is None:
            if text or self._logprobs:
                events.append(self._event(f'"content":{quote(text)}'))
        else:
            pieces = self._reader.push(text)
            if frame.finish:
                pieces += self._reader.finish()
            events += [self._event(self._delta(piece)) for piece in pieces]
        if frame.finish:
            reason = _chat_finish_reason(self._call, frame.finish.reason, has_calls=self._calls > 0)
            events.append(self._event("", f'"{reason}"'))
        return events

    def _delta(self, piece: Piece) -> str:
        if isinstance(piece, Content):
            return f'"content":{quote(piece.text)}'
        if isinstance(piece, CallBegins):
            call = _call_json(self.request, self._calls, piece.name, "")
            self._calls += 1
            return f'"tool_calls":[{_dumps({"index": self._calls - 1, **call})}]'
        number = self._calls - 1
        return f'"tool_calls":[{{"index":{number},"function":{{"arguments":{quote(piece.text)}}}}}]'

    def _event(self, delta: str, reason: str = "null") -> str:
        logprobs = "null"
        if self._logprobs:
            logprobs = _dumps({"content": self._logprobs, "refusal": None})
            self._logprobs = []
        return (
            f'{self._head}"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{reason}}}'
            f"{self._tail}"
        )


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
    shown = _shown(call, answer.tokens, with_call_tokens=reader is not None)
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
            _call_json(answer.request, number, name, "".join(arguments))
            for number, (name, arguments) in enumerate(message.calls)
        ]
    logprobs = None
    if call.has_logprobs:
        logprobs = {"content": [_chat_logprob(token) for token in shown], "refusal": None}
    reason = _chat_finish_reason(call, answer.finish.reason, has_calls=bool(message.calls))
    return {"index": index, "message": body, "logprobs": logprobs, "finish_reason": reason}


def message_text(call: ValidCall, answer: Completion) -> str:
    """The answer to a chat as one text: its content, or the calls as JSON."""
    message = _chat_choice(call, 0, answer, "")["message"]
    return message["content"] if message["content"] is not None else _dumps(message["tool_calls"])


def _completion_choice(
    call: ValidCall, index: int, answer: Completion, prompt: str
) -> dict[str, Any]:
    tokens: list[Token | TopToken] = []
    text = ""
    if call.echoes:
        text = prompt
        tokens += _shown(call, answer.prompt)
    if not call.drops_answer:
        answered = _shown(call, answer.tokens)
        text += "".join(token.text for token in answered)
        tokens += answered
    logprobs = _completion_logprobs(answer.request, tokens, 0) if call.has_logprobs else None
    reason = _finish_reason(answer.finish.reason)
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _shown(
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


def _finish_reason(reason: FinishReason) -> str:
    return "length" if reason is FinishReason.LENGTH else "stop"


def _chat_finish_reason(call: ValidCall, reason: FinishReason, *, has_calls: bool) -> str:
    """As at OpenAI, a function that the client named ends with `stop`."""
    if (
        has_calls
        and reason is not FinishReason.LENGTH
        and call.tools.choice is not ToolChoice.NAMED
    ):
        return "tool_calls"
    return _finish_reason(reason)


def _call_json(
    request: GenerationRequest, number: int, name: str, arguments: str
) -> dict[str, Any]:
    """The id is nine characters, as Mistral's templates ask for, and the same when a stream is read again."""
    id = hashlib.blake2b(f"{request.id}/{number}".encode(), digest_size=5).hexdigest()[:9]
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _chat_logprob(token: Token) -> dict[str, Any]:
    top = [_spelled(_text_of(other, token), other.logprob) for other in token.top]
    return {**_spelled(token.text, token.logprob), "top_logprobs": top}


def _spelled(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _completion_logprobs(
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


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
