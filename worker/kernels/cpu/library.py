"""The compiled kernels, called with tensors. Knows no model.

A processor that none of the libraries was made for has none: every caller then runs the torch
operations that a kernel stands for, which are also what its tests compare it with.
"""

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
LANES = 16
MAX_HEAD_DIM = 256
SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class CpuKernels:
    """The kernels for one type of number. Inputs are on the CPU, in memory row by row."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        suffix = SUFFIXES[dtype]
        self._rms_norm = kernel_function(library, f"rms_norm_{suffix}", "pppiiif")
        self._rotate = kernel_function(library, f"rotate_{suffix}", "pppiiiii")
        self._silu_gated = kernel_function(library, f"silu_gated_{suffix}", "ppii")
        self._add = kernel_function(library, f"add_{suffix}", "ppi")
        self._prompt_attention = None
        if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
            self._prompt_attention = kernel_function(
                library, "prompt_attention", "ppppppiiiiiiiiiiif"
            )
        self._paged_decode = kernel_function(
            library, f"paged_decode_{suffix}", "pppppiiiiiiiiiiiif"
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`[..., n]` normalised over n, a multiple of 16."""
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            *(out.data_ptr(), rows.data_ptr(), weight.data_ptr()),
            *(rows.shape[0], size, rows.stride(0), eps),
            torch.get_num_threads(),
        )
        return out

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn the heads `x` `[T, h, d]` in place by angles `[T, 1, d]`; d is a multiple of 32."""
        num_rows, num_heads, dim = x.shape
        self._rotate(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(num_rows, num_heads, dim, x.stride(0), x.stride(1)),
            torch.get_num_threads(),
        )

    def silu_gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for `x` = [gate | up], `[T, 2n]`; n is a multiple of 16."""
        assert x.dim() == 2 and x.is_contiguous()
        num_rows, size = x.shape[0], x.shape[1] // 2
        out = torch.empty((num_rows, size), dtype=x.dtype)
        self._silu_gated(out.data_ptr(), x.data_ptr(), num_rows, size, torch.get_num_threads())
        return out

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x += y; both in memory without gaps, their size a multiple of 16."""
        self._add(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())

    def can_attend_prompts(self, dim: int) -> bool:
        """Whether `prompt_attention` takes heads of so many features."""
        return self._prompt_attention is not None and dim % 64 == 0 and dim <= MAX_HEAD_DIM

    def prompt_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        blocks: torch.Tensor | None,
        num_keys: int,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        """The newest n queries of one sequence over its keys, each over those up to its own.

        Args:
            out: `[n, heads * d]`.
            q: `[n, heads, d]`.
            kv: the tokens' keys and values, `[num_keys, 2 * kv_heads, d]`; with `blocks` the
                layer's cache, `[num_blocks, block_size, 2 * kv_heads, d]`.
            mask: additive, `[n, num_keys]` or `[heads / kv_heads, kv_heads, n, num_keys]`, or None.
        """
        n, num_heads, dim = q.shape
        kv_heads = kv.shape[-2] // 2
        strides = (0, 0, 0)
        if mask is not None:
            strides = broadcast_strides(mask.view((1,) * (4 - mask.dim()) + mask.shape))
        packed = torch.empty(round_up(num_keys, 64) * kv_heads * dim, dtype=torch.int32)
        self._prompt_attention(
            *(out.data_ptr(), q.data_ptr(), kv.data_ptr()),
            None if blocks is None else blocks.data_ptr(),
            None if mask is None else mask.data_ptr(),
            *(packed.data_ptr(), n, q.stride(0), kv.stride(-3), kv.shape[1], num_keys, kv_heads),
            *(num_heads // kv_heads, dim, *strides, scale, torch.get_num_threads()),
        )

    def paged_decode(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        rows: torch.Tensor,
        blocks: torch.Tensor,
        keep: slice,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        """One query of each of B sequences over its blocks.

        Args:
            out: `[B, heads * d]`.
            q: `[B, heads, d]`; d is a multiple of 16.
            rows: the layer's cache, `[num_blocks, block_size, 2 * kv_heads, d]`.
            blocks: `[B * n]`, n of each sequence.
            keep: which of a sequence's tokens are looked at.
            mask: additive, `[B, 1 or kv_heads, 1 or heads / kv_heads, len(keep)]`, or None.
        """
        num_sequences, num_heads, dim = q.shape
        block_size, kv_heads = rows.shape[1], rows.shape[2] // 2
        strides = (0, 0, 0) if mask is None else broadcast_strides(mask)
        self._paged_decode(
            *(out.data_ptr(), q.data_ptr(), rows.data_ptr(), blocks.data_ptr()),
            None if mask is None else mask.data_ptr(),
            *(num_sequences, q.stride(0), blocks.shape[0] // num_sequences, block_size),
            *(kv_heads, num_heads // kv_heads, dim, keep.start, keep.stop, *strides, scale),
            torch.get_num_threads(),
        )


@functools.cache
def cpu_kernels(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for tensors of this type on this device; None: use torch's operations."""
    library = cpu_library() if device.type == "cpu" and dtype in SUFFIXES else None
    return None if library is None else CpuKernels(library, dtype)


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The library for this processor, if one was built."""
    path = FOLDER / f"kernels_{processor()}.so"
    return ctypes.CDLL(str(path)) if path.exists() else None


def processor() -> str:
    """Its name among what the libraries of `build_backend.py` are compiled for."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return platform.machine()
    if torch.cpu._is_avx512_bf16_supported():
        return "x86_64_v4_bf16"
    return "x86_64_v3" if torch.cpu._is_avx2_supported() else "x86_64"


@functools.cache
def kernel_function(library: ctypes.CDLL, name: str, arguments: str) -> Callable[..., None]:
    """A kernel; p is a pointer, i an integer, f a float. All end with the number of threads."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
    function = library[name]
    function.argtypes = [types[argument] for argument in arguments + "i"]
    function.restype = None
    return function


def broadcast_strides(mask: torch.Tensor) -> tuple[int, int, int]:
    """Of a mask's first three dimensions; 0 where it has one entry for all."""
    strides = [
        0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)
    ]
    return strides[0], strides[1], strides[2]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
