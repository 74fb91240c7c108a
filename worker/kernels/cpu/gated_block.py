"""The halves of a pre-normalised block around its attention, each in one call. Knows no model."""

import ctypes
from collections.abc import Sequence

import torch

from worker.kernels.cpu.library import LANES, cpu_library, kernel_function
from worker.kernels.cpu.products import PackedProduct

WeightAndEps = tuple[torch.Tensor, float]


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class _Product(ctypes.Structure):
    _fields_ = (
        *(("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p)),
        *(("num_outputs", ctypes.c_int64), ("num_inputs", ctypes.c_int64)),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *(("attention_norm", _Norm), ("mlp_norm", _Norm), ("q_norm", _Norm), ("k_norm", _Norm)),
        *(("qkv", _Product), ("output", _Product), ("gate_up", _Product), ("down", _Product)),
        *(("num_heads", ctypes.c_int64), ("num_kv_heads", ctypes.c_int64)),
        ("head_dim", ctypes.c_int64),
    )


class GatedBlock:
    """x + attention(norm(x)), then x + down(silu(gate) * up) of norm(x); the caller attends."""

    def __init__(
        self,
        library: ctypes.CDLL,
        norms: Sequence[WeightAndEps],
        products: Sequence[PackedProduct],
        heads: tuple[int, int, int],
    ) -> None:
        """See `gated_block`."""
        self._before = kernel_function(library, "block_before_attention", "ppppppppi")
        self._after = kernel_function(library, "block_after_attention", "pppppi")
        self._kept = tuple(weight for weight, _ in norms), tuple(products)  # what it points to
        self._hidden = products[0].num_inputs
        self._outputs = products[0].num_outputs
        self._num_scratch = 2 * self._hidden + 3 * products[3].num_inputs
        self.num_decoding_scratch = (
            self._num_scratch + self._hidden + products[0].num_outputs + products[1].num_inputs
        )
        self._block = _Block(
            *(_Norm(weight.data_ptr(), eps) for weight, eps in norms),
            *((_Norm(),) * (4 - len(norms))),
            *(_Product(p.pointer, p.bias_pointer, p.num_outputs, p.num_inputs) for p in products),
            *heads,
        )
        self.pointer = ctypes.addressof(self._block)

    def before_attention(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        cache_rows: torch.Tensor,
    ) -> torch.Tensor:
        """`[T, H]` to queries, keys and values `[T, heads + 2 * kv_heads, d]`, turned by angles
        `[T, 1, d]`; keys and values are also written to the rows `[T]` of a layer's `cache`."""
        num_rows = x.shape[0]
        heads = torch.empty((num_rows, self._outputs), dtype=x.dtype)
        scratch = torch.empty((num_rows, self._hidden), dtype=x.dtype)
        self._before(
            *(self.pointer, heads.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(cache.data_ptr(), cache_rows.data_ptr(), scratch.data_ptr(), num_rows),
            torch.get_num_threads(),
        )
        return heads.view(num_rows, -1, self._block.head_dim)

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`[T, H]` and `[T, heads * d]` to `[T, H]`."""
        num_rows, out = x.shape[0], torch.empty_like(x)
        scratch = torch.empty(num_rows * self._num_scratch, dtype=x.dtype)
        self._after(
            *(self.pointer, out.data_ptr(), x.data_ptr(), attended.data_ptr()),
            *(scratch.data_ptr(), num_rows, torch.get_num_threads()),
        )
        return out


def gated_block(
    norms: Sequence[WeightAndEps],
    products: Sequence[object],
    heads: tuple[int, int, int],
) -> GatedBlock | None:
    """A block on kernels, or None where a part of it has no such kernel.

    Args:
        norms: before the attention and before the MLP; then, where there are such, of each query
            head and of each key head.
        products: queries with keys and values, output, gate with up, down.
        heads: query heads, key-value heads, features of each.
    """
    library = cpu_library()
    is_ours = (
        library is not None
        and all(isinstance(product, PackedProduct) for product in products)
        and all(weight.dtype == torch.bfloat16 for weight, _ in norms)
        and all(product.num_inputs % LANES == 0 for product in products)
        and heads[2] % (2 * LANES) == 0
    )
    return GatedBlock(library, norms, products, heads) if is_ours else None
