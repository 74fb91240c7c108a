"""Matrix products with weights in the order that a processor reads them, in bfloat16 and in 8 bits.
Knows no model.

For processors without AMX: where it is, oneDNN's products are the faster ones.
"""

import ctypes
from collections.abc import Callable

import torch

from worker.kernels.cpu.library import SUFFIXES, cpu_library, kernel_function, round_up

PANEL = 32  # outputs of a packed weight
INT8_PANEL = 64
KEPT_ROWS = 1


class PackedProduct:
    """x Wᵀ + b in bfloat16, with the weight in the order that the processor reads it."""

    def __init__(
        self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._product = kernel_function(library, "matrix_product", "ppppiiii")
        self.num_outputs, self.num_inputs = weight.shape
        self._num_pairs = self.num_inputs // 2
        self._bias = None if bias is None else bias.detach().contiguous()
        self.bias_pointer = None if bias is None else self._bias.data_ptr()
        weight = weight.detach().contiguous()
        self._packed = torch.empty(
            round_up(self.num_outputs, PANEL) * self.num_inputs, dtype=weight.dtype
        )
        self.pointer = self._packed.data_ptr()
        kernel_function(library, "pack_weight", "ppii")(
            *(self.pointer, weight.data_ptr(), self.num_outputs, self._num_pairs),
            torch.get_num_threads(),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        assert x.dtype == self._packed.dtype and x.shape[-1] == 2 * self._num_pairs
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1 or rows.stride(0) % 2:
            rows = rows.contiguous()
        out = torch.empty((*x.shape[:-1], self.num_outputs), dtype=x.dtype)
        self._product(
            *(out.data_ptr(), rows.data_ptr(), self.pointer, self.bias_pointer),
            *(rows.shape[0], rows.stride(0) // 2, self.num_outputs, self._num_pairs),
            torch.get_num_threads(),
        )
        return out


class Int8Product:
    """x Wᵀ + b with a weight in 8 bits and rows of x rounded to 8 bits at each call."""

    def __init__(
        self,
        library: ctypes.CDLL,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self._products = {
            dtype: kernel_function(library, f"int8_product_{suffix}", "ppppppppiiii")
            for dtype, suffix in SUFFIXES.items()
        }
        self._num_outputs, self._num_inputs = values.shape
        self._row_bytes = round_up(self._num_inputs, 4)
        self._scales = scales
        self._bias = bias
        self._bias_pointer = None if bias is None else bias.data_ptr()
        self._shift = torch.empty(self._num_outputs, dtype=torch.int32)
        self._packed = torch.empty(
            round_up(self._num_outputs, INT8_PANEL) * self._row_bytes, dtype=torch.int8
        )
        self._kept = (
            torch.empty(KEPT_ROWS * self._row_bytes, dtype=torch.uint8),
            torch.empty(KEPT_ROWS),
        )
        kernel_function(library, "pack_int8", "pppii")(
            *(self._packed.data_ptr(), self._shift.data_ptr(), values.data_ptr()),
            *(*values.shape, torch.get_num_threads()),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`; numbers of another type than the kernels' pass through float32."""
        if x.dtype not in self._products:
            return self(x.float()).to(x.dtype)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty((*x.shape[:-1], self._num_outputs), dtype=x.dtype)
        q, largest = self._room(rows.shape[0])
        self._products[x.dtype](
            *(out.data_ptr(), rows.data_ptr(), self._packed.data_ptr(), self._scales.data_ptr()),
            *(self._shift.data_ptr(), self._bias_pointer, q.data_ptr(), largest.data_ptr()),
            *(rows.shape[0], rows.stride(0), self._num_outputs, self._num_inputs),
            torch.get_num_threads(),
        )
        return out

    def _room(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For rows of x in 8 bits and their magnitudes; kept for one row, where making it would show."""
        if num_rows <= KEPT_ROWS:
            return self._kept
        q = torch.empty(num_rows * self._row_bytes, dtype=torch.uint8)
        return q, torch.empty(num_rows)


def packed_product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Our product with a weight `[N, K]`, or None where it is not made for.

    Measured on Zen 4 against oneDNN's prepacked product: 1.3 to 2 times as fast with 1 to 8 rows,
    1.1 to 1.3 times with 32, the same with 128 and more. With AMX oneDNN is the faster one.
    """
    is_ours = (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
        and _is_ours()
    )
    library = cpu_library() if is_ours else None
    return None if library is None else PackedProduct(library, weight, bias)


def int8_product(
    values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Our product with int8 `values` `[N, K]`, or None where it is not made for.

    Args:
        scales: of the outputs, float32 `[N]`: a weight is its value times 127 times its scale.
        bias: float32 `[N]`, or None.
    """
    library = cpu_library() if values.device.type == "cpu" and _is_ours() else None
    if library is None:
        return None
    return Int8Product(library, values.contiguous(), scales.contiguous(), bias)


def _is_ours() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
