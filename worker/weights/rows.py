"""Which rows of a file's tensor become which rows of a parameter, for linears divided by outputs.

Files have q, k and v in one of several orders; here they are always [q heads | k heads | v heads],
so that one product gives views of all three:

    side by side   [q0 q1 | k0 k1 | v0 v1]      by heads   [q0 k0 v0 | q1 k1 v1]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.weights.pieces import JoinedPiece, Piece


@dataclass(frozen=True, slots=True)
class RowMap:
    """Which rows of a file's tensor become which rows of a shard's parameter."""

    size: int  # rows in the file
    moves: tuple[tuple[slice, slice], ...]  # (rows in the file, rows here)


def side_by_side(first: RowMap, second: RowMap) -> RowMap:
    """One tensor with the rows of `first`, then those of `second`."""
    moved = (
        (slice(source.start + first.size, source.stop + first.size), target)
        for source, target in second.moves
    )
    return RowMap(first.size + second.size, (*first.moves, *moved))


def by_heads(q: RowMap, k: RowMap, v: RowMap, head_dim: int) -> RowMap:
    """One tensor in which the rows of each head are its q, its k, its v (BLOOM, GPT-NeoX)."""
    moves = []
    for part, ((source, target),) in enumerate((q.moves, k.moves, v.moves)):
        for head in range((source.stop - source.start) // head_dim):
            start = 3 * (source.start + head * head_dim) + part * head_dim
            here = target.start + head * head_dim
            moves.append((slice(start, start + head_dim), slice(here, here + head_dim)))
    return RowMap(q.size + k.size + v.size, tuple(moves))


def row_pieces(
    rows: Mapping[str, RowMap], num_inputs: int, *, has_bias: bool, is_transposed: bool
) -> dict[str, dict[str, Piece | JoinedPiece]]:
    """Pieces of a weight (and bias) divided by rows, by the name of the tensor in the file."""
    every = slice(0, num_inputs)

    def weight(size: int, source: slice, target: slice) -> Piece:
        if is_transposed:
            return Piece((num_inputs, size), (every, source), (target, every), is_transposed=True)
        return Piece((size, num_inputs), (source, every), (target, every))

    def bias(size: int, source: slice, target: slice) -> Piece:
        return Piece((size,), (source,), (target,))

    def pieces(make: Callable[[int, slice, slice], Piece]) -> dict[str, Piece | JoinedPiece]:
        made = {
            name: tuple(make(row.size, *move) for move in row.moves) for name, row in rows.items()
        }
        return {
            name: parts[0] if len(parts) == 1 else JoinedPiece(parts)
            for name, parts in made.items()
        }

    return {"weight": pieces(weight)} | ({"bias": pieces(bias)} if has_bias else {})
