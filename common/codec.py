"""Dataclasses to msgpack and back.

Cold messages are maps by field name, so that a newer writer may add a field. Frames are positional arrays, because
one is written for every token. Both start with a schema version: an unknown one is an error, never a guess.
"""

import functools
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import msgpack

from common.messages import Failure, Finish, FinishReason, Frame, Token, TopToken

SCHEMA_VERSION = 1

_SCALARS = frozenset({int, float, str, bytes, bool})

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
        return _reader(cls)(body[0])
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


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _SCALARS or value is None:
        return value
    if kind is tuple:
        # a prompt is thousands of numbers: those need no look at each
        is_plain = not value or type(value[0]) in _SCALARS
        return value if is_plain else [_plain(item) for item in value]
    if is_dataclass(kind):
        return {name: _plain(getattr(value, name)) for name in _field_names(kind)}
    return value.value if isinstance(value, Enum) else value


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What turns msgpack's value into one of this type; made once for each type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (_reader(part) for part in typing.get_args(kind) if part is not types.NoneType)
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple_reader(typing.get_args(kind))
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    is_enum = isinstance(kind, type) and issubclass(kind, Enum)
    return kind if is_enum else lambda value: value


def _tuple_reader(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        item = _reader(kinds[0])
        if kinds[0] in _SCALARS:
            return tuple
        return lambda value: tuple(item(part) for part in value)
    items = tuple(_reader(kind) for kind in kinds)
    return lambda value: tuple(read(part) for read, part in zip(items, value, strict=True))


def _dataclass_reader(cls: type) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(cls)
    readers = {name: _reader(hints[name]) for name in _field_names(cls)}
    required = {field.name for field in fields(cls) if field.default is MISSING}

    def read(value: dict[str, Any]) -> Any:
        if missing := required - value.keys():
            raise DecodeError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
        return cls(**{name: readers[name](part) for name, part in value.items() if name in readers})

    return read
