"""RMSNorm (Zhang and Sennrich 2019), with the roundings of the reference implementations."""

import torch
import torch.nn.functional as F
from torch import nn

from worker.layers.build import Build
from worker.weights.pieces import whole


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    As in the models' training code the quotient is computed in float32 and rounded before it meets
    the weight.
    """

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(size)
        self.eps = eps
        self.pieces = {"weight": whole((size,))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (
            F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype).mul_(self.weight)
        )
