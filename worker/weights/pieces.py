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
    is_transposed: bool = False  # the file has [inputs, outputs]; `shape` and `source` tell of that

    @property
    def parts(self) -> "tuple[Piece, ...]":
        """A piece alone is its only part."""
        return (self,)


@dataclass(frozen=True, slots=True)
class JoinedPiece:
    """One tensor of a file whose parts go to several places of a parameter, as a fused q, k, v."""

    parts: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names in a family's files.

    Attributes:
        table: name in the files -> parameter path, with `:piece` where several tensors share a
            parameter.
        aliases: name -> the name whose parameter is used instead, if the files lack the first.
        ignored: ends of names that some files carry and nobody needs.
        prefix: what some files leave out at the beginning of every name.
        renamed: other names that some files use -> the name in `table`. A file may hold the same
            tensor under several of them.
    """

    table: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


def whole(shape: tuple[int, ...]) -> dict[str, Piece]:
    """The only piece of a parameter that every shard holds entirely."""
    everything = tuple(slice(0, size) for size in shape)
    return {"": Piece(shape, everything, everything)}


def of_modules(modules: Mapping[str, str], *, has_bias: bool = True) -> dict[str, str]:
    """Names of weight and bias of each module: `c_attn` -> `qkv:qkv` gives `c_attn.weight` ->
    `qkv.weight:qkv`, and the same for `bias`."""
    names = {}
    for module, target in modules.items():
        layer, colon, piece = target.partition(":")
        for parameter in ("weight", "bias") if has_bias else ("weight",):
            names[f"{module}.{parameter}"] = f"{layer}.{parameter}{colon}{piece}"
    return names


def of_layers(per_layer: Mapping[str, str], prefix: str, num_layers: int) -> dict[str, str]:
    """The names of one layer, for all: in the files `{prefix}{number}.`, here `layers.{number}.`"""
    return {
        f"{prefix}{layer}.{name}": f"layers.{layer}.{target}"
        for layer in range(num_layers)
        for name, target in per_layer.items()
    }
