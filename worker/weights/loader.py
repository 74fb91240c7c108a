"""Streams the tensors of safetensors files into a model, and proves that nothing is missing. Knows
no families.

Order is the files' order. A parameter comes into being with its first piece, and a layer whose
parameters are all filled is sealed at once (packed for its kernel, the original freed). So the host
holds, beside the model, about one tensor. A shard reads only its own slices of each tensor.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from worker.weights.pieces import JoinedPiece, Piece, WeightNames


class WeightError(ValueError):
    """The files and the model do not fit together; the message names the tensors."""


def load_weights(
    model: nn.Module, names: WeightNames, files: Sequence[Path], device: torch.device
) -> None:
    """Fill every parameter of `model`, which was built on the meta device.

    Raises:
        WeightError: tensors are missing, unexpected, of another shape, or stored twice.
    """
    filling = _Filling(model, names, device)
    for name, tensor in _stream(files):
        filling.add(name, tensor)
    filling.finish()


def _stream(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """(name, lazy slice) of every tensor; the rows are read when they are indexed."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                yield name, file.get_slice(name)


class _Filling:
    """The state of one load: what has arrived, and what was wrong with it."""

    def __init__(self, model: nn.Module, names: WeightNames, device: torch.device) -> None:
        self._model = model
        self._names = names
        self._device = device
        self._arrived: set[str] = set()
        self._problems: list[str] = []
        # What each layer still waits for: (parameter, piece) pairs.
        self._open: dict[str, set[tuple[str, str]]] = {}
        for target in names.table.values():
            layer, parameter, piece = _split(target)
            self._open.setdefault(layer, set()).add((parameter, piece))

    def add(self, name: str, tensor: Any) -> None:
        name = self._names.renamed.get(name, name)
        if name not in self._names.table and self._names.prefix + name in self._names.table:
            name = self._names.prefix + name
        target = self._names.table.get(name)
        if target is None:
            if not name.endswith(self._names.ignored):
                self._problems.append(f"unexpected: {name}")
            return
        if name in self._arrived:
            if name not in self._names.renamed.values():
                self._problems.append(f"stored twice: {name}")
            return
        self._arrived.add(name)
        layer, parameter, piece_name = _split(target)
        piece: Piece | JoinedPiece = self._model.get_submodule(layer).pieces[parameter][piece_name]
        shape = tuple(tensor.get_shape())
        if shape != piece.shape:
            self._problems.append(f"wrong shape: {name} is {shape}, the model needs {piece.shape}")
            return
        for part in piece.parts:
            if part.source is not None:
                values = tensor[part.source]
                self._parameter(layer, parameter)[part.target] = (
                    values.T if part.is_transposed else values
                )
        self._close(layer, parameter, piece_name)

    def finish(self) -> None:
        missing = [name for name in self._names.table if name not in self._arrived]
        for name in missing:
            source = self._names.aliases.get(name)
            if source in self._arrived:
                self._share(name, source)
            else:
                self._problems.append(f"missing: {name}")
        if self._problems:
            shown = "; ".join(self._problems[:8])
            more = f"; and {len(self._problems) - 8} more" if len(self._problems) > 8 else ""
            raise WeightError(f"the weight files do not fit the model's config: {shown}{more}")

    def _share(self, name: str, source: str) -> None:
        """Let `name` use the parameter of `source`: the same memory, until a layer packs its own
        copy."""
        layer, parameter, piece = _split(self._names.table[name])
        source_layer, source_parameter, _ = _split(self._names.table[source])
        shared = getattr(self._model.get_submodule(source_layer), source_parameter)
        setattr(self._model.get_submodule(layer), parameter, shared)
        self._close(layer, parameter, piece)

    def _parameter(self, layer: str, name: str) -> torch.Tensor:
        module = self._model.get_submodule(layer)
        parameter = getattr(module, name)
        if parameter.is_meta:
            # Zeros, because a padded vocabulary has rows that no file fills.
            parameter = nn.Parameter(
                torch.zeros_like(parameter, device=self._device), requires_grad=False
            )
            setattr(module, name, parameter)
        return parameter.data

    def _close(self, layer: str, parameter: str, piece: str) -> None:
        waiting = self._open[layer]
        waiting.remove((parameter, piece))
        if not waiting and hasattr(module := self._model.get_submodule(layer), "seal"):
            module.seal()


def _split(target: str) -> tuple[str, str, str]:
    """`layers.0.attention.qkv.weight:q` -> (`layers.0.attention.qkv`, `weight`, `q`)."""
    path, _, piece = target.partition(":")
    layer, _, parameter = path.rpartition(".")
    return layer, parameter, piece
