"""How a tensor of a checkpoint maps onto a part of a parameter of this shard. Plain values; no
tensors.

file: q_proj.weight [8, 4]      shard 1 of 2           parameter qkv.weight [8, 4]

  rows 0-3  of shard 0                                   rows 0-3  q   <- target (0:4)
  rows 4-7  of shard 1   ── source (4:8) ──────────►     rows 4-5  k
                                                         rows 6-7  v
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Piece:
    """Part `source` of a file's tensor of shape `shape` fills part `target` of a parameter."""

    shape: tuple[int, ...]
    source: tuple[slice, ...] | None  # None: this shard needs nothing of it
    target: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names in a family's files.

    Attributes:
        table: name in the files -> parameter path, with `:piece` where several tensors share a
            parameter.
        aliases: name -> the name whose parameter is used instead, if the files lack the first.
        ignored: ends of names that some files carry and nobody needs.
        prefix: what some files leave out at the beginning of every name.
    """

    table: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    prefix: str = ""


def whole(shape: tuple[int, ...]) -> dict[str, Piece]:
    """The only piece of a parameter that every shard holds entirely."""
    everything = tuple(slice(0, size) for size in shape)
    return {"": Piece(shape, everything, everything)}
