"""`.bin` checkpoints to safetensors, file by file. Such a file is a pickle: only tensors are read
from it (`weights_only`), so that it cannot run code, whoever made it.

    pytorch_model-00001-of-00002.bin ──mapped──► model-00001-of-00002.safetensors
    pytorch_model-00002-of-00002.bin ──mapped──► model-00002-of-00002.safetensors
    pytorch_model.bin.index.json                 model.safetensors.index.json       written last

A file is copied in blocks from the mapping, so that memory holds a few of them and not a file; pages
that the mapping has touched are the kernel's cache.
"""

import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from worker.weights.files import ModelFilesError
from worker.weights.tensor_file import BLOCK_BYTES, header_of, stored_tensors

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# Copies of a tied matrix, which is kept under its main name, in the order in which they may go.
_COPIES = (".encoder.embed_tokens.weight", ".decoder.embed_tokens.weight", "embed_out.weight")


def convert_bin_files(
    sources: Iterable[Path],
    folder: Path,
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Path]:
    """Write each source as a safetensors file into `folder`, with an index for several.

    Returns the files written, the one that makes the folder complete last. Each is read again and
    compared with its source.

    Raises:
        ModelFilesError: a source is damaged, or holds anything but tensors.
    """
    sources = list(sources)
    names: dict[str, str] = {}
    written: list[Path] = []
    num_bytes = 0
    for done, source in enumerate(sources):
        tensors = _read(source)
        twice = names.keys() & tensors.keys()
        if twice:
            raise ModelFilesError(f"{source.name} holds {min(twice)!r}, as does another file")
        target = folder / ("model.safetensors" if len(sources) == 1 else _target_name(source))
        _write(tensors, target, source)
        names |= dict.fromkeys(tensors, target.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        written.append(target)
        del tensors
        on_progress((done + 1) / len(sources))
    if len(sources) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(names.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.append(folder / INDEX)
    return written


def _target_name(source: Path) -> str:
    return source.name.removesuffix(".bin").removeprefix("pytorch_") + ".safetensors"


def _read(source: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; where the format allows it, mapped and not read."""
    try:
        state = _load(source)
    except pickle.UnpicklingError as error:
        raise ModelFilesError(
            f"{source} holds more than tensors, so reading it could run code that came with it; "
            "get the model as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise ModelFilesError(f"{source} cannot be read as a PyTorch file: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ModelFilesError(f"{source} holds no table of tensors")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        log.warning("%s: left out what is no tensor: %s", source.name, ", ".join(map(str, others)))
    return _without_copies({str(k): v for k, v in state.items() if isinstance(v, Tensor)})


def _load(source: Path) -> object:
    # Files of the format before torch 1.6 are no zip archives, and cannot be mapped.
    is_mapped = zipfile.is_zipfile(source)
    return torch.load(source, map_location="cpu", weights_only=True, mmap=is_mapped)


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of names that share a tensor the one that models load by: safetensors stores no sharing."""
    kept: dict[object, str] = {}
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        # Empty tensors have no address of their own.
        key = view if tensor.numel() else name
        if key not in kept or _rank(name) < _rank(kept[key]):
            kept[key] = name
    names = set(kept.values())
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _rank(name: str) -> int:
    """0: the main name of a tied matrix; the others are copies of it."""
    if name.endswith("lm_head.weight"):
        return len(_COPIES) + 1
    ends = (rank for rank, end in enumerate(_COPIES, 1) if f".{name}".endswith(end))
    return next(ends, 0)


def _write(tensors: Mapping[str, Tensor], target: Path, source: Path) -> None:
    """Write, read again and compare; the file appears complete or not at all."""
    # The widest types first, so that every tensor lies at a multiple of its type's size.
    ordered = {
        name: tensors[name] for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))
    }
    partial = target.with_name(f".{target.name}.partial")
    try:
        try:
            header = header_of({name: (one.dtype, one.shape) for name, one in ordered.items()})
        except ValueError as error:
            raise ModelFilesError(f"{source} cannot be written as safetensors: {error}") from error
        with partial.open("wb") as stream:
            stream.write(header)
            for tensor in ordered.values():
                for piece in _pieces(tensor):
                    stream.write(piece.numpy().data)
        _verify(ordered, partial, source)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _verify(tensors: Mapping[str, Tensor], written: Path, source: Path) -> None:
    found = stored_tensors(written)
    is_same = [(one.name, one.dtype, one.shape) for one in found] == [
        (name, one.dtype, tuple(one.shape)) for name, one in tensors.items()
    ]
    with written.open("rb") as stream:
        stream.seek(found[0].offset if found else 0)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                is_same = is_same and stream.read(len(piece)) == piece.numpy().data
    if not is_same:
        raise ModelFilesError(
            f"what was written of {source} reads back differently: check the disk"
        )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The contents bit by bit, in order, as short runs of bytes. A tensor may be a view of a larger
    one, whose other parts are not its own."""
    if tensor.numel() == 0:
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row_bytes = max(1, rows[0].numel() * rows.itemsize)
    for part in rows.split(max(1, BLOCK_BYTES // row_bytes)):
        yield part.contiguous().reshape(-1).view(torch.uint8)
