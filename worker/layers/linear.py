"""Linear layers divided among shards, and the ways to run a matrix product. Knows no model.

With two shards, W = [A1; A2] by rows of outputs (column parallel), then B = [B1 B2] by columns of
inputs (row parallel):

    x ──┬── x A1ᵀ = y1 ── y1 B1ᵀ ──┐
        │    shard 0               + ── all_reduce ── z = x Wᵀ Bᵀ     one collective for the pair,
        └── x A2ᵀ = y2 ── y2 B2ᵀ ──┘                                   none between the two layers
             shard 1

A bias of the first is divided like its rows; a bias of the second is added on shard 0 only, before
the sum.
Shapes: T tokens, K input features, N output features (of the whole model; local sizes are N/size or
K/size).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from worker.kernels.cpu.products import packed_product
from worker.layers.build import Build
from worker.weights.pieces import Piece, whole
from worker.weights.rows import RowMap, by_heads, row_pieces, side_by_side

MatrixProduct = Callable[[torch.Tensor], torch.Tensor]
"""`[T, K] -> [T, N]`, with the weight inside."""

# The weight layout that oneDNN chooses for this many rows is right for any number, and fast from 1
# to 32.
PACK_ROWS_HINT = 32


def matrix_product(weight: torch.Tensor, bias: torch.Tensor | None) -> MatrixProduct:
    """The fastest product that this device has for a weight `[N, K]` of this type: the backend
    of what is not quantized."""
    product = packed_product(weight, bias)
    if product is not None:
        return product
    if can_pack(weight):
        return _packed(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a prepacked product for this weight on this CPU.

    Measured against `F.linear` with 1 to 32 rows on AVX-512 cores: 1.2 to 2.2 times as fast, in
    bfloat16 and in float32.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> MatrixProduct:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_ROWS_HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    if bias is not None:
        bias = bias.detach()
    return lambda x: product(x, packed, bias, "none", [], "")


class Linear(nn.Module):
    """y = x Wᵀ + b with local sizes; the base of all linears."""

    def __init__(
        self, num_inputs: int, num_outputs: int, build: Build, *, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = build.parameter(num_outputs, num_inputs)
        self.bias = build.parameter(num_outputs) if has_bias else None
        self.pieces: dict[str, dict[str, Piece]] = {}
        self.product: MatrixProduct | None = None
        self._backend = build.linear_backend or matrix_product

    def seal(self) -> None:
        """All weights have arrived: hand them to the backend, which may keep a packed copy instead
        of them."""
        self.product = self._backend(self.weight, self.bias)
        self.weight = self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class ReplicatedLinear(Linear):
    """One linear that every shard holds and computes whole."""

    def __init__(
        self, num_inputs: int, num_outputs: int, build: Build, *, has_bias: bool = False
    ) -> None:
        super().__init__(num_inputs, num_outputs, build, has_bias=has_bias)
        self.pieces = {"weight": whole((num_outputs, num_inputs))}
        if has_bias:
            self.pieces["bias"] = whole((num_outputs,))


class MergedColumnLinear(Linear):
    """Several linears of the same input as one product; every output is divided among the shards by
    rows.

    `outputs` names the parts and their sizes in the whole model. The local result is their shares,
    side by side. `is_transposed`: the files have weights as [inputs, outputs], like GPT-2's Conv1D.
    """

    def __init__(
        self,
        num_inputs: int,
        outputs: Sequence[tuple[str, int]],
        build: Build,
        *,
        has_bias: bool = False,
        is_transposed: bool = False,
    ) -> None:
        shares = [
            (name, size, build.shard.divide(size, f"the size of {name}")) for name, size in outputs
        ]
        super().__init__(num_inputs, sum(share for *_, share in shares), build, has_bias=has_bias)
        rows = {}
        offset = 0
        for name, size, share in shares:
            first = build.shard.rank * share
            rows[name] = RowMap(
                size, ((slice(first, first + share), slice(offset, offset + share)),)
            )
            offset += share
        self.pieces = row_pieces(rows, num_inputs, has_bias=has_bias, is_transposed=is_transposed)


class ColumnLinear(MergedColumnLinear):
    """One linear whose outputs are divided among the shards."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        build: Build,
        *,
        has_bias: bool = False,
        is_transposed: bool = False,
    ) -> None:
        outputs = [("", num_outputs)]
        super().__init__(num_inputs, outputs, build, has_bias=has_bias, is_transposed=is_transposed)


class QkvLinear(Linear):
    """Queries, keys and values as one product, divided by heads: local rows are [q heads | k heads
    | v heads].

    With more shards than key-value heads, neighbouring shards hold the same key-value head:

        8 query heads, 2 key-value heads, 4 shards:    shard   0    1    2    3
                                                       q      01   23   45   67
                                                       k, v    0    0    1    1

    Files have them apart or fused, so the layer offers more pieces than one file fills:

        q, k, v   each alone                     kv     [k heads | v heads]
        qkv       [q heads | k heads | v heads]  heads  [q k v of head 0 | q k v of head 1 | ...]
    """

    def __init__(
        self,
        num_inputs: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        build: Build,
        has_bias: bool = False,
        is_transposed: bool = False,
    ) -> None:
        shard = build.shard
        self_heads = shard.divide(num_heads, "the number of attention heads")
        kv_heads, first_kv_head = local_kv_heads(num_kv_heads, build)
        super().__init__(
            num_inputs, (self_heads + 2 * kv_heads) * head_dim, build, has_bias=has_bias
        )
        parts = (
            ("q", num_heads, self_heads, shard.rank * self_heads),
            ("k", num_kv_heads, kv_heads, first_kv_head),
            ("v", num_kv_heads, kv_heads, first_kv_head),
        )
        rows = {}
        offset = 0
        for name, total, share, first in parts:
            source = slice(first * head_dim, (first + share) * head_dim)
            target = slice(offset, offset + share * head_dim)
            rows[name] = RowMap(total * head_dim, ((source, target),))
            offset = target.stop
        rows["kv"] = side_by_side(rows["k"], rows["v"])
        rows["qkv"] = side_by_side(rows["q"], rows["kv"])
        if num_heads == num_kv_heads:
            rows["heads"] = by_heads(rows["q"], rows["k"], rows["v"], head_dim)
        self.pieces = row_pieces(rows, num_inputs, has_bias=has_bias, is_transposed=is_transposed)


def local_kv_heads(num_kv_heads: int, build: Build) -> tuple[int, int]:
    """How many key-value heads this shard holds, and the first of them."""
    shard = build.shard
    if shard.size <= num_kv_heads:
        share = shard.divide(num_kv_heads, "the number of key-value heads")
        return share, shard.rank * share
    if shard.size % num_kv_heads:
        raise ValueError(
            "the number of shards must be a multiple of the number of key-value heads, "
            "or a divisor of it. "
            f"Given: {shard.size} and {num_kv_heads}"
        )
    return 1, shard.rank // (shard.size // num_kv_heads)


class RowLinear(Linear):
    """One linear whose inputs are divided among the shards; the result is whole, and the same on
    every shard."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        build: Build,
        *,
        has_bias: bool = False,
        is_transposed: bool = False,
    ) -> None:
        self.shard = build.shard
        is_biased_here = has_bias and self.shard.rank == 0
        share = self.shard.divide(num_inputs, "the number of inputs of a row-parallel linear")
        super().__init__(share, num_outputs, build, has_bias=is_biased_here)
        rows = slice(0, num_outputs)
        columns = slice(self.shard.rank * share, (self.shard.rank + 1) * share)
        here = (rows, slice(0, share))
        self.pieces["weight"] = {
            "": Piece((num_inputs, num_outputs), (columns, rows), here, is_transposed=True)
            if is_transposed
            else Piece((num_outputs, num_inputs), (rows, columns), here)
        }
        if has_bias:
            self.pieces["bias"] = {
                "": Piece((num_outputs,), (rows,) if is_biased_here else None, (rows,))
            }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shard.all_reduce(self.partial(x))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This shard's summand. Who adds several of them before the `all_reduce` saves the others."""
        return self.product(x)
