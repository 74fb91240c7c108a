"""Safetensors files as plain bytes: where each tensor lies, and its rows, block by block. Knows no
model.

    8 bytes: n | n bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors, end to end

Files are read and not mapped. A mapping is filled by page faults, which wait for the disk a few
pages at a time and count as memory of the process; a read of a block gives the kernel time to read
ahead, and needs no memory but the block. Source: the safetensors format.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch

from worker.weights.files import ModelFilesError

# Small enough to stay in a core's cache between the read and the copy into a parameter.
BLOCK_BYTES = 2 * 2**20
_LARGEST_FOLIO_BYTES = 2 * 2**20
_LONGEST_HEADER = 100_000_000  # as in the reference implementation

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: rows of the shape `shape[1:]`, end to end from byte `offset` on."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def header_of(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """The beginning of a file of tensors with these types and shapes, which follow in this order.

    With it, a file is written as a stream: the library takes all tensors at once. Raises ValueError
    for a type that the format does not have.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in names:
            raise ValueError(f"{name} is of type {dtype}, which safetensors does not have")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file in the order of their bytes. Raises ModelFilesError."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _LONGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
            tensors = [
                _stored(file, name, entry, start=8 + size)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            available = os.fstat(stream.fileno()).st_size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFilesError(f"{file} is no safetensors file: {error}") from error
    tensors.sort(key=lambda tensor: tensor.offset)
    needed = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=0)
    if needed > available:
        raise ModelFilesError(
            f"{file} ends too early: its tensors need {needed} bytes and it has {available}. "
            "Download the model again"
        )
    return tensors


def _stored(file: Path, name: str, entry: dict[str, Any], *, start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of the unknown type {entry['dtype']}")
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
    if begin < 0 or end - begin != tensor.num_bytes:
        raise ValueError(f"{name} has a shape that does not fit its bytes")
    return tensor


class BlockReader:
    """Reads rows through one buffer, which every block overwrites. For one thread; each has its
    own file position and so its own read-ahead."""

    def __init__(self, *, is_pinned: bool, drops_cache: bool) -> None:
        """Args:
        is_pinned: a GPU can fetch from the buffer by itself.
        drops_cache: the kernel forgets a block as soon as it was read, and has its pages for the
            next one. Fresh pages for a whole file can cost more than to read it, most of all on a
            virtual machine, whose host has to find each.
        """
        self._is_pinned = is_pinned
        self._drops_cache = drops_cache
        self._buffer = self._room_for(BLOCK_BYTES)
        self._file: FileIO | None = None
        self._path: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def rows(
        self, tensor: StoredTensor, first: int, last: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows `first` to `last` (exclusive) in blocks: the number of a block's first row, and the
        rows, which are good until the next block. Raises ModelFilesError."""
        self._open(tensor.file)
        if tensor.row_bytes > self._buffer.numel():
            self._buffer = self._room_for(tensor.row_bytes)
        per_block = self._buffer.numel() // max(tensor.row_bytes, 1)
        for start in range(first, last, per_block):
            num_rows = min(per_block, last - start)
            block = self._buffer[: num_rows * tensor.row_bytes]
            offset = tensor.offset + start * tensor.row_bytes
            self._read(block, offset)
            if self._drops_cache:
                self._drop(offset, offset + len(block))
            yield start, block.view(tensor.dtype).view(num_rows, *tensor.shape[1:])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._path = None

    def _open(self, path: Path) -> None:
        if path != self._path:
            self._close()
            self._file, self._path = path.open("rb", buffering=0), path

    def _read(self, block: torch.Tensor, offset: int) -> None:
        rest = memoryview(block.numpy())
        while rest:
            num_bytes = os.preadv(self._file.fileno(), [rest], offset)
            if num_bytes == 0:
                raise ModelFilesError(f"{self._path} became shorter while it was read")
            rest, offset = rest[num_bytes:], offset + num_bytes

    def _drop(self, start: int, end: int) -> None:
        """Let the kernel forget these bytes. It forgets no folio (up to 2 MiB in one) that is only
        partly meant, so each block also names the one before it, where its first folio begins."""
        start = max(0, start - _LARGEST_FOLIO_BYTES)
        os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def _room_for(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
