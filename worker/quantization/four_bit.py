"""bitsandbytes' 4-bit weights, nf4 and fp4 (Dettmers et al. 2023, QLoRA). Activations stay whole.

64 neighbours of a row share one scale, their largest magnitude, in float32; a weight is one of 16
levels of it. That is 4.5 bits a weight.

    as quantized [N, K/2]: a byte has the weights k, k+1 of one row
    packed for AVX512  [N/32, K/2, 32]: the rows of a block of 32 lie side by side, and a byte has
                       weights of rows n and n+16; scales [K/64, N], bfloat16
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from worker.layers.build import LinearBackend
from worker.quantization.library import import_bitsandbytes

BLOCK_SIZE = 64
PACKED_ROWS = 32


def four_bit_backend(kind: str) -> LinearBackend:
    """The backend of `--quantize bitsandbytes-{kind}`, nf4 or fp4. Raises ValueError if the package
    is missing."""
    return partial(_product, import_bitsandbytes(), kind)


def _product(
    library: ModuleType, kind: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    num_outputs, num_inputs = weight.shape
    if num_inputs % BLOCK_SIZE:
        raise ValueError(
            f"bitsandbytes-{kind} divides the inputs of every linear layer into blocks of "
            f"{BLOCK_SIZE}, so their number on a shard must be a multiple of that. "
            f"Given: {num_inputs}; use another number of shards, or `quantize` int8"
        )
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    levels, state = library.functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=False, quant_type=kind
    )
    if weight.device.type != "cpu":
        return lambda x: library.matmul_4bit(x, levels, state, bias=bias)
    if (
        weight.dtype == torch.bfloat16
        and num_outputs % PACKED_ROWS == 0
        and library.functional.has_avx512bf16()
    ):
        return _packed(levels, state, bias)
    return _unpacked(levels, state, kind, weight.dtype, bias)


def _packed(
    levels: torch.Tensor, state: object, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """bitsandbytes' kernel for AVX512-bf16; in spite of its name it takes any number of rows."""
    num_outputs, num_inputs = shape = tuple(state.shape)
    weight = pack(levels, num_outputs, num_inputs)
    scales = state.absmax.view(num_outputs, num_inputs // BLOCK_SIZE).T.bfloat16().contiguous()
    multiply = torch.ops.bitsandbytes.gemv_4bit.default

    def product(x: torch.Tensor) -> torch.Tensor:
        y = multiply(x, weight, shape, scales, state.code, BLOCK_SIZE)
        return y if bias is None else y.add_(bias)

    return product


def pack(levels: torch.Tensor, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """4-bit weights as quantized -> as the kernel for AVX512 reads them, `[N, K/2]` bytes."""
    blocks = levels.view(num_outputs // PACKED_ROWS, PACKED_ROWS, num_inputs // 2)
    pairs = blocks.transpose(1, 2)
    single = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(2)  # 32 rows of (k, k+1)
    low, high = single.chunk(2, dim=2)
    return (high << 4 | low).view(num_outputs, num_inputs // 2)


def _unpacked(
    levels: torch.Tensor,
    state: object,
    kind: str,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Where there is no such kernel: the weights of one layer at a time, whole again."""
    shape = tuple(state.shape)
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    return lambda x: F.linear(
        x, dequantize(levels, state.absmax, BLOCK_SIZE, kind, shape, dtype), bias
    )
