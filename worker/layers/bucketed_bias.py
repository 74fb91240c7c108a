"""T5's relative position bias (Raffel et al. 2020): a learned number a head and bucket of distances.

With 32 buckets and a longest distance of 128, for a decoder, which sees no key after the query:

    distance   0  1  2 ... 15 | 16-18  19-20  21-23 ... 113-
    bucket     0  1  2 ... 15 |   16     17     18  ...  31     exact, then logarithmic

An encoder has half of the buckets for keys before the query, the others for keys after it.
"""

import math

import torch
from torch import nn

from worker.layers.build import Build
from worker.weights.pieces import Piece


class BucketedBias(nn.Module):
    """Distances to biases, for this shard's heads."""

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        build: Build,
        *,
        is_bidirectional: bool,
    ) -> None:
        super().__init__()
        share = build.shard.divide(num_heads, "the number of attention heads")
        heads = slice(build.shard.rank * share, (build.shard.rank + 1) * share)
        every = slice(0, num_buckets)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.is_bidirectional = is_bidirectional
        self.weight = build.parameter(num_buckets, share)
        piece = Piece((num_buckets, num_heads), (every, heads), (every, slice(0, share)))
        self.pieces = {"weight": {"": piece}}
        self.table: torch.Tensor | None = None  # [heads, 2 * max_distance + 1], once sealed

    def seal(self) -> None:
        """The weight has arrived: look the bias of every distance up, once."""
        distance = torch.arange(-self.max_distance, self.max_distance + 1)
        buckets = bucket(
            distance, self.num_buckets, self.max_distance, is_bidirectional=self.is_bidirectional
        )
        self.table = self.weight[buckets.to(self.weight.device)].T.contiguous()
        self.weight = None

    def forward(self, distance: torch.Tensor) -> torch.Tensor:
        """Position of the query less that of the key, `[...]` int64, to `[heads, ...]`."""
        index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return self.table[:, index]


def bucket(
    distance: torch.Tensor, num_buckets: int, max_distance: int, *, is_bidirectional: bool
) -> torch.Tensor:
    """The bucket of each distance (query less key), both int64. Distances beyond the longest share
    a bucket; without keys after the query, so do all that are below 0."""
    first = torch.zeros_like(distance)
    if is_bidirectional:
        num_buckets //= 2
        first = torch.where(distance < 0, num_buckets, 0)
        distance = distance.abs()
    distance = distance.clamp(0, max_distance)
    num_exact = num_buckets // 2
    steps = (distance / num_exact).log() / math.log(max_distance / num_exact)
    logarithmic = num_exact + (steps * (num_buckets - num_exact)).clamp(min=0).long()
    logarithmic = logarithmic.clamp(max=num_buckets - 1)
    return first + torch.where(distance < num_exact, distance, logarithmic)
