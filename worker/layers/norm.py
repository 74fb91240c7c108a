"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), with the roundings of the
reference implementations."""

import torch
import torch.nn.functional as F
from torch import nn

from worker.kernels.cpu.library import LANES, cpu_kernels
from worker.layers.build import Build
from worker.weights.pieces import whole


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    As in the models' training code the quotient is computed in float32 and rounded before it meets
    the weight. The result has the weight's type, which may be shorter than that of `x`.
    """

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(size)
        self.eps = eps
        self.pieces = {"weight": whole((size,))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, dtype = self.weight.shape, self.weight.dtype
        kernels = cpu_kernels(x.device, dtype)
        if kernels is not None and x.dtype == dtype and shape[0] % LANES == 0:
            return kernels.rms_norm(x, self.weight, self.eps)
        if dtype == torch.float32:
            return F.rms_norm(x, shape, self.weight, self.eps)
        return F.rms_norm(x.float(), shape, None, self.eps).to(dtype).mul_(self.weight)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    `has_weights` is false for a few OPT models, which normalise and no more.
    """

    def __init__(self, size: int, eps: float, build: Build, *, has_weights: bool = True) -> None:
        super().__init__()
        self.size = (size,)
        self.weight = build.parameter(size) if has_weights else None
        self.bias = build.parameter(size) if has_weights else None
        self.eps = eps
        self.pieces = {"weight": whole((size,)), "bias": whole((size,))} if has_weights else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)
