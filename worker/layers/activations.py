"""Activation functions by the names of Hugging Face, and gated ones."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from worker.kernels.cpu.library import LANES, cpu_kernels

_gelu_tanh = partial(F.gelu, approximate="tanh")

# Several names are one function: they were written out in different ways, for speed or for older
# versions of torch.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that a config calls `name`. Raises ValueError."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}. Given: {name!r}")
    return ACTIVATIONS[name]


def gated(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """function(gate) * up for `x` = [gate | up] along the last dimension (Shazeer 2020)."""
    kernels = cpu_kernels(x.device, x.dtype) if function is F.silu else None
    if kernels is not None and x.shape[-1] % (2 * LANES) == 0:
        return kernels.silu_gated(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate).mul_(up)
