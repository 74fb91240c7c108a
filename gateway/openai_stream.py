"""Frames to OpenAI's chunks, up to `data: [DONE]`. Knows no HTTP, and is lean: it runs for every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import Finish, Frame, GenerationRequest, Token, TopToken
from gateway.native_format import quote
from gateway.openai_format import (
    Envelope,
    call_json,
    chat_finish_reason,
    dumps,
    finish_reason,
    shown_tokens,
    usage_of,
)
from gateway.openai_logprobs import chat_logprob, completion_logprobs
from gateway.openai_validation import ValidCall
from gateway.tool_calls import CallBegins, Content, Piece

DONE = "data: [DONE]\n\n"


class StreamFormat:
    """Writes the events of one call. Events have ids, as on the native routes, where there is only one choice."""

    def __init__(
        self, call: ValidCall, envelope: Envelope, requests: Sequence[GenerationRequest]
    ) -> None:
        kind = "chat.completion.chunk" if call.is_chat else "text_completion"
        self._head = f"data: {dumps(envelope.members(kind))[:-1]}"
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
        usage = dumps(usage_of(self._call, finishes))
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
                tokens += shown_tokens(self.call, frame.prompt)
        if not self.call.drops_answer:
            answered = shown_tokens(self.call, frame.tokens)
            text += "".join(token.text for token in answered)
            tokens += answered
        finish = finish_reason(frame.finish.reason) if frame.finish else None
        if not text and finish is None and not (tokens and self.call.has_logprobs):
            return []
        logprobs = "null"
        if self.call.has_logprobs:
            logprobs = dumps(completion_logprobs(self.request, tokens, self._offset))
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
        shown = shown_tokens(self._call, frame.tokens, with_call_tokens=has_calls)
        if self._call.has_logprobs:
            self._logprobs += map(chat_logprob, shown)
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
            reason = chat_finish_reason(self._call, frame.finish.reason, has_calls=self._calls > 0)
            events.append(self._event("", f'"{reason}"'))
        return events

    def _delta(self, piece: Piece) -> str:
        if isinstance(piece, Content):
            return f'"content":{quote(piece.text)}'
        if isinstance(piece, CallBegins):
            call = call_json(self.request, self._calls, piece.name, "")
            self._calls += 1
            return f'"tool_calls":[{dumps({"index": self._calls - 1, **call})}]'
        number = self._calls - 1
        return f'"tool_calls":[{{"index":{number},"function":{{"arguments":{quote(piece.text)}}}}}]'

    def _event(self, delta: str, reason: str = "null") -> str:
        logprobs = "null"
        if self._logprobs:
            logprobs = dumps({"content": self._logprobs, "refusal": None})
            self._logprobs = []
        return (
            f'{self._head}"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{reason}}}'
            f"{self._tail}"
        )
