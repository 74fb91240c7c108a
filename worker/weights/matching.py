"""Which tensor of the files fills which part of which parameter; decided, and refused, before any
weight is read. Knows names and shapes, no values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from worker.weights.pieces import JoinedPiece, Piece, WeightNames
from worker.weights.tensor_file import StoredTensor

_SHOWN = 8  # problems in a message


class WeightError(ValueError):
    """The files and the model do not fit together; the message names the tensors."""


@dataclass(frozen=True, slots=True)
class Target:
    """A piece of a parameter: `layers.0.attention.qkv.weight:q` is (`layers.0.attention.qkv`,
    `weight`, `q`)."""

    layer: str
    parameter: str
    piece: str

    @classmethod
    def of(cls, text: str) -> "Target":
        path, _, piece = text.partition(":")
        layer, _, parameter = path.rpartition(".")
        return cls(layer, parameter, piece)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One tensor of a file, on its way to a parameter."""

    stored: StoredTensor
    target: Target
    parts: tuple[Piece, ...]  # those that this shard needs; may be none

    @property
    def num_values(self) -> int:
        """How many values of the parameter it fills."""
        return sum(math.prod(side.stop - side.start for side in part.target) for part in self.parts)

    @property
    def row_ranges(self) -> list[tuple[int, int]]:
        """The rows of the file that are needed, in order; neighbours are one range."""
        ranges: list[tuple[int, int]] = []
        for rows in sorted((part.source[0].start, part.source[0].stop) for part in self.parts):
            if ranges and rows[0] <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], rows[1]))
            else:
                ranges.append(rows)
        return ranges


@dataclass(frozen=True, slots=True)
class Matching:
    """Every piece that a model needs is in one of these.

    Attributes:
        deliveries: in the order of the files.
        shared: what no file has -> the target whose parameter is used instead.
    """

    deliveries: tuple[Delivery, ...]
    shared: tuple[tuple[Target, Target], ...]


def match(model: nn.Module, names: WeightNames, stored: Iterable[StoredTensor]) -> Matching:
    """Find a use for every tensor, and a tensor for every use.

    Raises:
        WeightError: tensors are missing, unexpected, of another shape, or stored twice.
    """
    problems: list[str] = []
    deliveries: dict[str, Delivery | None] = {}
    for tensor in stored:
        name = _name_in_table(tensor.name, names)
        if name is None:
            if not names.renamed.get(tensor.name, tensor.name).endswith(names.ignored):
                problems.append(f"unexpected: {tensor.name}")
        elif name not in deliveries:
            deliveries[name] = _delivery(model, Target.of(names.table[name]), tensor, problems)
        elif name not in names.renamed.values():
            problems.append(f"stored twice: {name}")
    shared = []
    for name in (name for name in names.table if name not in deliveries):
        source = names.aliases.get(name)
        if source in deliveries:
            shared.append((Target.of(names.table[name]), Target.of(names.table[source])))
        else:
            problems.append(f"missing: {name}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightError(
            f"the weight files do not fit the model's config: {'; '.join(problems[:_SHOWN])}{more}"
        )
    return Matching(tuple(deliveries.values()), tuple(shared))


def _name_in_table(name: str, names: WeightNames) -> str | None:
    name = names.renamed.get(name, name)
    candidates = (name, names.prefix + name)
    return next((candidate for candidate in candidates if candidate in names.table), None)


def _delivery(
    model: nn.Module, target: Target, tensor: StoredTensor, problems: list[str]
) -> Delivery | None:
    pieces = model.get_submodule(target.layer).pieces
    piece: Piece | JoinedPiece = pieces[target.parameter][target.piece]
    if tensor.shape != piece.shape:
        problems.append(
            f"wrong shape: {tensor.name} is {tensor.shape}, the model needs {piece.shape}"
        )
        return None
    return Delivery(tensor, target, tuple(part for part in piece.parts if part.source is not None))
