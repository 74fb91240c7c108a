"""bitsandbytes' 8-bit weights (Dettmers et al. 2022, LLM.int8), without the part for outliers.

That part looks into the activations at every call to find columns that it keeps in 16 bits: a wait
for the device in every layer, and no CUDA graph. So its threshold is 0 here, and what is left is
int8 by rows, the same arithmetic as ours.
"""

from collections.abc import Callable

import torch

from worker.layers.build import LinearBackend
from worker.quantization.int8 import LARGEST, Int8Weight, product_of
from worker.quantization.library import import_bitsandbytes


def llm_int8_backend() -> LinearBackend:
    """The backend of `--quantize bitsandbytes`. Raises ValueError if the package is missing."""
    import_bitsandbytes()
    return _product


def _product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    # bitsandbytes quantizes from float16 only. `row_sizes` are the largest magnitudes by rows.
    quantize = torch.ops.bitsandbytes.int8_vectorwise_quant.default
    values, row_sizes, _ = quantize(weight.detach().to(torch.float16), 0.0)
    if weight.device.type == "cpu":
        # Its own CPU path is the same sum, with a warning at every call.
        return product_of(Int8Weight(values, row_sizes.float() / LARGEST), bias)
    scaled_product = torch.ops.bitsandbytes.int8_scaled_mm.default
    bias = None if bias is None else bias.detach()

    def product(x: torch.Tensor) -> torch.Tensor:
        q, sizes, _ = quantize(x.to(torch.float16), 0.0)
        return scaled_product(q, values, sizes, row_sizes, bias=bias, dtype=x.dtype)

    return product
