"""ALiBi (Press et al. 2022): positions as a bias on attention scores, lower the further away.

    score(query, key) = q k scale - slope[head] * (position of query - position of key)

Transformers adds slope * key position instead, which the softmax cannot tell apart; but in 16 bits
that rounds most where it matters, near the query, and the distance rounds most far away.
"""

import math

import torch

from worker.layers.build import Build


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slope of each head of the whole model, `[num_heads]` float32.

    With a power of two, a geometric series that ends in 1/256; else that of the next smaller power,
    followed by every other slope of the next larger one.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = _series(power) + _series(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def _series(num_heads: int) -> list[float]:
    return [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]


class Alibi:
    """A `DistanceBias` of `worker/kernels/bias.py`. A shard's slopes are those of its own heads
    among all."""

    def __init__(self, num_heads: int, build: Build) -> None:
        self.num_heads = build.shard.divide(num_heads, "the number of attention heads")
        first = build.shard.rank * self.num_heads
        slopes = alibi_slopes(num_heads)[first : first + self.num_heads]
        self._slopes = slopes.to(build.device)
        self._dtype = build.dtype

    def __call__(self, distances: torch.Tensor) -> torch.Tensor:
        """`[...]` to `[heads, ...]`, in float32 until the last step."""
        slopes = self._slopes.view(-1, *(1 for _ in distances.shape))
        return (-slopes * distances).to(self._dtype)
