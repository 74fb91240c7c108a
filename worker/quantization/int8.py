"""Linear layers in 8 bits, weights and activations (W8A8). Knows no model and no file.

    x [T, K] ── largest of each row, a [T, 1] ── q = round(127 x / a) ── q Wqᵀ ── · s · a / 127 ── y
                                                  8 bits               int32      float32, then x's

A row of weights has one scale, s = largest / 127, found once; a row of activations has its own,
found at every call. So a token's numbers depend on no other token of the batch, and since the sum
is of integers, not even in their last bit.
Shapes: T tokens, K input features, N output features, of this shard.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from worker.kernels.cpu.products import int8_product as compiled_product

LARGEST = 127  # symmetric: -128 is not used
OFFSET = 128  # of an activation as oneDNN wants it, unsigned

# oneDNN's prepacked product is the fastest for a large weight, but each call costs some 40 us more
# than `torch._int_mm`, which is as long as a million weights take. Both compute the same integers.
PACK_FROM_WEIGHTS = 2**20

# What cuBLAS demands of `torch._int_mm`.
CUDA_MIN_ROWS = 24  # more than 16, in eights
CUDA_ALIGNMENT = 8

# Weights that are float32 at the same time while a large matrix is quantized.
SLICE_WEIGHTS = 2**24


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """W ≈ values * scales[:, None]; values are int8 `[N, K]`, scales float32 `[N]`."""

    values: torch.Tensor
    scales: torch.Tensor


def int8_product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Quantize a weight `[N, K]`: the backend of `--quantize int8`."""
    return product_of(quantize_rows(weight), bias)


def quantize_rows(weight: torch.Tensor) -> Int8Weight:
    """Round each row to 8 bits, with its largest magnitude at 127. A row of zeros stays one."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    num_rows = max(1, SLICE_WEIGHTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        part = weight[rows].float()
        scale = part.abs().amax(1) / LARGEST
        scales[rows] = scale
        values[rows] = (part / scale.masked_fill(scale == 0, 1)[:, None]).round_().to(torch.int8)
    return Int8Weight(values, scales)


def product_of(
    weight: Int8Weight, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest product that this device has for a weight in 8 bits."""
    if bias is not None:
        bias = bias.detach().float()
    if weight.values.device.type != "cpu":
        return _PaddedProduct(weight, bias)
    compiled = compiled_product(weight.values, weight.scales / LARGEST, bias)
    if compiled is not None:
        return compiled
    if weight.values.numel() >= PACK_FROM_WEIGHTS and can_pack():
        return _PackedProduct(weight, bias)
    return _PlainProduct(weight, bias)


def can_pack() -> bool:
    """Whether oneDNN's product is exact here. Without VNNI, pairs of products are added in 16 bits,
    which overflow."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


class _RowScaled:
    """What all products share: the scales on both sides of the integers."""

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._scales = weight.scales / LARGEST  # the other half of 1 / 127 is in `_levels`
        self._levels = torch.full((1, 1), float(LARGEST), device=weight.scales.device)
        self._bias = bias

    def _scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` with each row's largest magnitude at 127, float32, and those magnitudes `[T, 1]`.

        A row of zeros becomes NaN and then whatever integers; times its magnitude they are zero.
        """
        values = x.float()
        largest = values.abs().amax(-1, keepdim=True)
        return values * (self._levels / largest), largest

    def _finish(self, y: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = y.mul_(largest)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(dtype)


class _PackedProduct(_RowScaled):
    """oneDNN's product with a weight in its own layout."""

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._weight = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._zeros = torch.zeros_like(self._scales, dtype=torch.int32)
        self._product = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, largest = self._scaled(x)
        q = values.add_(OFFSET + 0.5).to(torch.uint8)  # truncated, all are positive: rounded
        weights = (self._weight, self._scales, self._zeros, None)
        y = self._product(q, 1.0, OFFSET, *weights, 1.0, 0, torch.float32, "none", [], "")
        return self._finish(y, largest, x.dtype)


class _PlainProduct(_RowScaled):
    """torch's product with a weight as it is."""

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._weight = weight.values.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, largest = self._scaled(x)
        y = torch._int_mm(values.round_().to(torch.int8), self._weight) * self._scales
        return self._finish(y, largest, x.dtype)


class _PaddedProduct(_RowScaled):
    """cuBLAS's product, which wants sizes in eights and more than 16 rows: zeros fill them up."""

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._num_outputs, num_inputs = weight.values.shape
        self._missing_inputs = -num_inputs % CUDA_ALIGNMENT
        missing = (0, self._missing_inputs, 0, -self._num_outputs % CUDA_ALIGNMENT)
        self._weight = F.pad(weight.values, missing).t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, largest = self._scaled(x)
        num_tokens = x.shape[0]
        missing_rows = max(CUDA_MIN_ROWS - num_tokens, -num_tokens % CUDA_ALIGNMENT)
        q = F.pad(values.round_().to(torch.int8), (0, self._missing_inputs, 0, missing_rows))
        y = torch._int_mm(q, self._weight)[:num_tokens, : self._num_outputs] * self._scales
        return self._finish(y, largest, x.dtype)
