"""Plans as msgpack and back. Every dataclass is a row of its fields, in order, so that a plan is
small and quick to read.

The rows are derived from the dataclasses' types: a field that is added to a plan travels by itself.
A fingerprint of those types goes with each plan; shards of different versions refuse each other.
"""

import types
import typing
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgpack

Value = TypeVar("Value")
Convert = Callable[[Any], Any]


class RowError(ValueError):
    """The bytes are no value of this type, or of another version of it."""


class RowCodec(Generic[Value]):
    """Turns values of one dataclass into bytes and back. Types that msgpack lacks: dataclasses,
    tuples, enums, optional values."""

    def __init__(self, cls: type[Value]) -> None:
        """Raises TypeError for a field of a type that cannot travel."""
        self._cls = cls
        self._to_row, self._from_row = _converters(cls)
        self._fingerprint = zlib.crc32(_describe(cls).encode())

    def encode(self, value: Value) -> bytes:
        return msgpack.packb((self._fingerprint, self._to_row(value)))

    def decode(self, data: bytes) -> Value:
        """Raises RowError."""
        try:
            fingerprint, row = msgpack.unpackb(data, use_list=False)
        except (ValueError, TypeError) as error:
            raise RowError(f"not a {self._cls.__name__}: {error}") from error
        if fingerprint != self._fingerprint:
            raise RowError(
                f"this {self._cls.__name__} is of another version of tokenfleet; "
                "all shards must run the same one"
            )
        return self._from_row(row)


def _same(value: Any) -> Any:
    return value


def _converters(hint: Any) -> tuple[Convert, Convert]:
    """How a value of this type becomes what msgpack knows, and back; `_same` where it is that."""
    if is_dataclass(hint):
        return _of_dataclass(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _of_tuple(arguments)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (kind for kind in arguments if kind is not type(None))
        return tuple(map(_or_none, _converters(inner)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return attrgetter("value"), hint
    if hint in (int, float, str, bool, bytes):
        return _same, _same
    raise TypeError(f"a value of type {hint} cannot travel in a plan")


def _of_dataclass(cls: type) -> tuple[Convert, Convert]:
    hints = typing.get_type_hints(cls)
    names = [one.name for one in fields(cls)]
    pairs = [_converters(hints[name]) for name in names]
    get = attrgetter(*names) if len(names) > 1 else lambda value: (getattr(value, names[0]),)
    to_row, from_row = (_each([pair[side] for pair in pairs]) for side in (0, 1))
    return (
        get if to_row is _same else lambda value: to_row(get(value)),
        (lambda row: cls(*row)) if from_row is _same else lambda row: cls(*from_row(row)),
    )


def _of_tuple(arguments: tuple[Any, ...]) -> tuple[Convert, Convert]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_all(convert) for convert in _converters(arguments[0]))
    pairs = [_converters(kind) for kind in arguments]
    return tuple(_each([pair[side] for pair in pairs]) for side in (0, 1))


def _all(convert: Convert) -> Convert:
    return _same if convert is _same else lambda values: tuple(map(convert, values))


def _each(converts: list[Convert]) -> Convert:
    if all(convert is _same for convert in converts):
        return _same
    return lambda row: tuple([convert(value) for convert, value in zip(converts, row, strict=True)])


def _or_none(convert: Convert) -> Convert:
    if convert is _same:
        return _same
    return lambda value: None if value is None else convert(value)


def _describe(hint: Any) -> str:
    """The type in full, down to its leaves: equal texts mean equal rows."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return f"{hint.__name__}({', '.join(f'{f.name}: {_describe(hints[f.name])}' for f in fields(hint))})"
    arguments = typing.get_args(hint)
    if arguments:
        kind = getattr(typing.get_origin(hint), "__name__", "union")
        return f"{kind}[{', '.join(map(_describe, arguments))}]"
    return getattr(hint, "__name__", repr(hint))
