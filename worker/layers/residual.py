"""The residual stream: what each half of a block adds to it."""

import torch

from worker.kernels.cpu.library import LANES, cpu_kernels


def added(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """x + delta, both `[T, H]`; in the memory of `delta`, which nobody else may need."""
    kernels = cpu_kernels(x.device, x.dtype) if x.dtype == delta.dtype else None
    if kernels is not None and x.shape[-1] % LANES == 0 and x.is_contiguous():
        kernels.add_(delta, x)
        return delta
    return delta.add_(x) if x.dtype == delta.dtype else x + delta
