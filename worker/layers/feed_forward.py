"""The two-layer feed-forward network of models before gated ones: down(activation(up(x)))."""

import torch
from torch import nn

from worker.layers.activations import activation
from worker.layers.build import Build
from worker.layers.linear import ColumnLinear, RowLinear


class FeedForward(nn.Module):
    """`[T, H]` to `[T, H]`, with `inner_size` features between; `is_transposed` is as in
    `MergedColumnLinear`."""

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        build: Build,
        *,
        activation_name: str,
        has_bias: bool = True,
        is_transposed: bool = False,
    ) -> None:
        super().__init__()
        options = {"has_bias": has_bias, "is_transposed": is_transposed}
        self.up = ColumnLinear(hidden_size, inner_size, build, **options)
        self.down = RowLinear(inner_size, hidden_size, build, **options)
        self.activation = activation(activation_name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This shard's summand of the result; see `RowLinear.partial`."""
        return self.down.partial(self.activation(self.up(x)))
