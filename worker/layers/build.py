"""What every layer is told when it is made. A value, passed down; there is no ambient device or
type."""

from dataclasses import dataclass

import torch

from worker.parallel.group import Shard


@dataclass(frozen=True, slots=True)
class Build:
    """Where and how a model is built."""

    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    shard: Shard = Shard()

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        """A parameter without memory: `worker/weights/loader.py` replaces it by a real one on
        `device`."""
        empty = torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.nn.Parameter(empty, requires_grad=False)
