"""Dataclasses to msgpack and back.

Cold messages are maps by field name, so that a newer writer may add a field. Frames are positional arrays, because
one is written for every token. Both start with a schema version: an unknown one is an error, never a guess.
"""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import msgpack

from common.messages import Failure, Finish, FinishReason, Frame, Token, TopToken

SCHEMA_VERSION = 1

Message = TypeVar("Message")


class DecodeError(ValueError):
    """The bytes are no message of this schema version."""


def encode(message: Any) -> bytes:
    """A message as msgpack: `[version, {field: value}]`."""
    return msgpack.packb([SCHEMA_VERSION, _plain(message)])


def decode(cls: type[Message], data: bytes) -> Message:
    """The message of type `cls` in `data`. Raises DecodeError."""
    body = _unpack(data)
    try:
        return _build(cls, body[0])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DecodeError(f"not a {cls.__name__}: {error}") from error


def encode_frame(frame: Frame) -> bytes:
    """A frame as msgpack: `[version, chain, tokens, prompt, finish, failure]`, trailing empties left out."""
    body: list[Any] = [SCHEMA_VERSION, frame.chain, [_token_row(token) for token in frame.tokens]]
    if frame.prompt or frame.is_terminal:
        body.append([_top_row(top) for top in frame.prompt])
        finish, failure = frame.finish, frame.failure
        if finish:
            timings = [finish.queue_s, finish.prefill_s, finish.decode_s, finish.cached_tokens]
            body.append([finish.reason.value, finish.generated_tokens, *timings])
        elif failure:
            body += [None, [failure.kind, failure.message]]
    return msgpack.packb(body)


def decode_frame(data: bytes) -> Frame:
    """The frame in `data`. Raises DecodeError."""
    body = _unpack(data)
    try:
        tokens = tuple(
            Token(row[0], row[1], row[2], row[3], tuple(TopToken(*top) for top in row[4]))
            for row in body[1]
        )
        if len(body) == 2:
            return Frame(tokens, body[0])
        prompt = tuple(TopToken(*row) for row in body[2])
        finish = body[3] if len(body) > 3 else None
        failure = body[4] if len(body) > 4 else None
        return Frame(
            tokens,
            body[0],
            prompt,
            Finish(FinishReason(finish[0]), *finish[1:]) if finish else None,
            Failure(*failure) if failure else None,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise DecodeError(f"not a frame: {error}") from error


def _token_row(token: Token) -> list[Any]:
    top = [_top_row(top) for top in token.top]
    return [token.id, token.text, token.logprob, token.is_special, top]


def _top_row(top: TopToken) -> list[Any]:
    return [top.id, top.text, top.logprob, top.is_special]


def _unpack(data: bytes) -> list[Any]:
    try:
        body = msgpack.unpackb(data)
    except ValueError as error:
        raise DecodeError(f"not msgpack: {error}") from error
    if not isinstance(body, list) or len(body) < 2:
        raise DecodeError("not a versioned message")
    if body[0] != SCHEMA_VERSION:
        raise DecodeError(f"schema version {body[0]}, this process reads {SCHEMA_VERSION}")
    return body[1:]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _build(cls: Any, value: Any) -> Any:
    origin = typing.get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        inner = [kind for kind in typing.get_args(cls) if kind is not type(None)]
        return None if value is None else _build(inner[0], value)
    if origin is tuple:
        kinds = typing.get_args(cls)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return tuple(_build(kinds[0], item) for item in value)
        return tuple(_build(kind, item) for kind, item in zip(kinds, value, strict=True))
    if is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        known = {
            f.name: _build(hints[f.name], value[f.name]) for f in fields(cls) if f.name in value
        }
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in value]
        if missing:
            raise DecodeError(f"{cls.__name__} lacks {', '.join(missing)}")
        return cls(**known)
    return cls(value) if isinstance(cls, type) and issubclass(cls, Enum) else value
