"""Layers of gated blocks, in one call for a step that only decodes. Knows no model."""

import ctypes
from collections.abc import Sequence

import torch

from worker.kernels.cpu.gated_block import GatedBlock
from worker.kernels.cpu.library import (
    MAX_HEAD_DIM,
    broadcast_strides,
    cpu_library,
    kernel_function,
)
from worker.kernels.metadata import AttentionMetadata, DecodeGroup


class _Group(ctypes.Structure):
    _fields_ = (
        *(("first_row", ctypes.c_int64), ("num_sequences", ctypes.c_int64)),
        *(("blocks", ctypes.c_void_p), ("num_blocks", ctypes.c_int64)),
        *(("keep_start", ctypes.c_int64), ("keep_stop", ctypes.c_int64)),
        *(("mask", ctypes.c_void_p), ("mask_strides", ctypes.c_int64 * 3)),
    )


class _View(ctypes.Structure):
    _fields_ = (("groups", ctypes.POINTER(_Group)), ("num_groups", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        *(("block", ctypes.c_void_p), ("cache", ctypes.c_void_p)),
        *(("view", ctypes.c_int64), ("scale", ctypes.c_double)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *(("views", ctypes.POINTER(_View)), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p)),
        *(("cache_rows", ctypes.c_void_p), ("entered", ctypes.c_void_p)),
        *(("num_entered", ctypes.c_int64), ("block_size", ctypes.c_int64)),
        ("num_rows", ctypes.c_int64),
    )


class GatedDecoder:
    """Every layer's block with its attention."""

    def __init__(
        self,
        blocks: Sequence[GatedBlock],
        windows: Sequence[int | None],
        scales: Sequence[float],
        cache: Sequence[torch.Tensor],
    ) -> None:
        """`cache`: the layers', `[num_blocks, block_size, 2 * kv_heads, d]` each."""
        self._decode = kernel_function(cpu_library(), "decode_layers", "pippp")
        self._kept = tuple(blocks), tuple(cache)  # what it points to
        self._windows = tuple(dict.fromkeys(windows))
        self._block_size = cache[0].shape[1]
        self._num_scratch = blocks[0].num_decoding_scratch
        self._layers = (_Layer * len(blocks))(
            *(
                _Layer(block.pointer, rows.data_ptr(), self._windows.index(window), scale)
                for block, rows, window, scale in zip(blocks, cache, windows, scales, strict=True)
            )
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`x` `[T, H]`, in place: one token of each of T sequences, turned by angles `[T, 1, d]`."""
        entered = metadata.entered_blocks
        groups = [
            (_Group * len(view.groups))(*map(_group, view.groups))
            for view in (metadata.views[window] for window in self._windows)
        ]
        step = _Step(
            (_View * len(groups))(*(_View(view, len(view)) for view in groups)),
            *(cos.data_ptr(), sin.data_ptr(), metadata.cache_rows.data_ptr()),
            *((None, 0) if entered is None else (entered.data_ptr(), entered.numel())),
            *(self._block_size, x.shape[0]),
        )
        scratch = torch.empty(x.shape[0] * self._num_scratch, dtype=x.dtype)
        self._decode(
            *(ctypes.addressof(self._layers), len(self._layers), ctypes.addressof(step)),
            *(x.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
        )
        return x


def _group(group: DecodeGroup) -> _Group:
    num_sequences, mask = group.stop - group.start, group.mask
    return _Group(
        *(group.start, num_sequences),
        *(group.blocks.data_ptr(), group.blocks.shape[0] // num_sequences),
        *(group.keep.start, group.keep.stop),
        None if mask is None else mask.data_ptr(),
        (ctypes.c_int64 * 3)(*((0, 0, 0) if mask is None else broadcast_strides(mask))),
    )


def gated_decoder(
    blocks: Sequence[GatedBlock | None],
    *,
    windows: Sequence[int | None],
    scales: Sequence[float],
    cache: Sequence[torch.Tensor],
) -> GatedDecoder | None:
    """A decoder of the layers' blocks, or None where there is no kernel for one of them."""
    is_ours = all(block is not None for block in blocks) and cache[0].shape[-1] <= MAX_HEAD_DIM
    return GatedDecoder(blocks, windows, scales, cache) if is_ours else None
