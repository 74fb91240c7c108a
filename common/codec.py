"""Messages to msgpack and back.

Cold messages are maps by field name, so that a newer writer may add a field. Frames are positional arrays, because
one is written for every token. Both start with a schema version: an unknown one is an error, never a guess.
"""

import functools
from typing import TypeVar

import msgspec

from common.messages import SCHEMA_VERSION, Frame

Message = TypeVar("Message")


class DecodeError(ValueError):
    """The bytes are no message of this schema version."""


def encode(message: object) -> bytes:
    """A message as msgpack: `[version, {field: value}]`."""
    return msgspec.msgpack.encode((SCHEMA_VERSION, message))


def decode(cls: type[Message], data: bytes) -> Message:
    """The message of type `cls` in `data`. Raises DecodeError."""
    try:
        version, body = _envelope().decode(data)
        if version == SCHEMA_VERSION:
            return _decoder(cls).decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DecodeError(f"not a {cls.__name__}: {error}") from error
    raise DecodeError(f"schema version {version}, this process reads {SCHEMA_VERSION}")


# A frame is `[version, chain, tokens, prompt, finish, failure]`. The chain hash is bytes 5 to 12, which `reseed.lua`
# compares.
encode_frame = msgspec.msgpack.Encoder().encode
_decode_frame = msgspec.msgpack.Decoder(Frame).decode


def decode_frame(data: bytes) -> Frame:
    """The frame in `data`. Raises DecodeError."""
    try:
        return _decode_frame(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DecodeError(f"not a frame: {error}") from error


@functools.cache
def _envelope() -> msgspec.msgpack.Decoder[tuple[int, msgspec.Raw]]:
    return msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])


@functools.cache
def _decoder(cls: type[Message]) -> msgspec.msgpack.Decoder[Message]:
    return msgspec.msgpack.Decoder(cls)
