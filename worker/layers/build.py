"""What every layer is told when it is made. A value, passed down; there is no ambient device or
type."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.parallel.group import Shard

LinearBackend = Callable[
    [torch.Tensor, torch.Tensor | None], Callable[[torch.Tensor], torch.Tensor]
]
"""From a weight `[N, K]` and a bias `[N]` to the product with them, `[T, K] -> [T, N]`. It may keep
the weight in another form and drop the original."""


@dataclass(frozen=True, slots=True)
class Build:
    """Where and how a model is built.

    Attributes:
        linear_backend: runs the products of linear layers; None is the plain one, in `dtype`.
        head_backend: the same for the output head.
    """

    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    shard: Shard = Shard()
    linear_backend: LinearBackend | None = None
    head_backend: LinearBackend | None = None

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        """A parameter without memory: `worker/weights/loader.py` replaces it by a real one on
        `device`."""
        empty = torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.nn.Parameter(empty, requires_grad=False)
