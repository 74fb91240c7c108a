"""Which part of the model this process holds, and the two collectives that layers use. Knows no
plans and no models."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `rank` of `size`. With size 1 the collectives return their argument and need no process
    group."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all shards, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every shard, in the order of ranks, joined along the last dimension; all have one
        shape."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def divide(self, total: int, what: str) -> int:
        """This shard's share of `total`. Raises ValueError if the shards cannot have equal
        shares."""
        if total % self.size:
            raise ValueError(
                f"{what} must be divisible by the number of shards. Given: {total} and {self.size}"
            )
        return total // self.size
