"""Decode attention over the paged cache: what the engine does today (gather, then SDPA) beside a
Triton kernel; and what torch's own flash attention offers."""

import os
from dataclasses import dataclass

import torch

from tests.benchmarks.on_gpu.bench import Bench, Rows, Unanswered, Wrong
from worker.kernels import sdpa
from worker.kernels.metadata import DecodeGroup
from worker.kernels.reference import attend

BLOCK_SIZE = 32
DIM = 128
SHAPES = (
    (1, 1024),
    (32, 1024),
    (256, 1024),
    (1, 8192),
    (32, 8192),
    (256, 8192),
)  # sequences, context
MOST_CACHE_BYTES = 9 * 2**30  # 256 x 8192 of grouped heads; with all heads it is left out
CONFIGS = ((256, 64, 4, 2), (512, 64, 4, 2), (256, 64, 8, 3), (512, 128, 8, 2))


@dataclass(frozen=True, slots=True)
class Heads:
    """A kind of attention."""

    name: str
    num_heads: int
    kv_heads: int
    has_slopes: bool = False


KINDS = (Heads("GQA 32/8", 32, 8), Heads("MHA 32/32, ALiBi", 32, 32, has_slopes=True))


class Case:
    """Sequences of one length, with blocks in a random order, and queries for them."""

    def __init__(
        self, bench: Bench, heads: Heads, num_sequences: int, context: int, *, dim: int = DIM
    ) -> None:
        self.heads = heads
        self.context = context
        blocks_each = -(-context // BLOCK_SIZE)
        num_blocks = num_sequences * blocks_each
        # Triton's interpreter, which is all that a CPU has, miscomputes bfloat16.
        dtype = torch.bfloat16 if bench.is_cuda else torch.float16
        sizes = (num_blocks, BLOCK_SIZE, 2 * heads.kv_heads, dim)
        self.rows = torch.empty(sizes, dtype=dtype, device=bench.device).normal_()
        order = torch.randperm(num_blocks, device=bench.device)
        self.table = order.view(num_sequences, blocks_each).to(torch.int32)
        self.lengths = torch.full((num_sequences,), context, dtype=torch.int32, device=bench.device)
        self.q = bench.randn(num_sequences, heads.num_heads, dim, dtype=dtype)
        self.scale = dim**-0.5
        self.slopes = None
        if heads.has_slopes:
            powers = torch.arange(1, heads.num_heads + 1, device=bench.device)
            self.slopes = 2.0 ** (-8.0 * powers / heads.num_heads)

    @property
    def num_bytes(self) -> int:
        """Of keys and values that a step reads."""
        return len(self.q) * self.context * 2 * self.heads.kv_heads * self.q.shape[2] * 2

    def gathered(self) -> torch.Tensor:
        """As the engine does it."""
        mask = None
        if self.slopes is not None:
            distance = torch.arange(1 - self.context, 1, device=self.q.device)
            bias = (self.slopes[:, None] * distance).to(self.q.dtype)
            group = self.heads.num_heads // self.heads.kv_heads
            mask = bias.view(1, self.heads.kv_heads, group, -1).expand(len(self.q), -1, -1, -1)
        group = DecodeGroup(
            0, len(self.q), self.table.flatten().long(), slice(0, self.context), mask
        )
        return sdpa._decode(self.q, self.rows, group, self.scale).view_as(self.q)

    def by_triton(self, split: int, tile: int, num_warps: int, num_stages: int) -> torch.Tensor:
        from tests.benchmarks.on_gpu.triton_decode import decode

        return decode(
            *(self.q, self.rows, self.table, self.lengths),
            scale=self.scale,
            max_length=self.context,
            slopes=self.slopes,
            split=split,
            tile=tile,
            num_warps=num_warps,
            num_stages=num_stages,
        )

    def exact(self) -> torch.Tensor:
        """By definition, in float64, one token after the other."""
        tables = [row.tolist() for row in self.table]
        positions = [self.context - 1] * len(self.q)
        return attend(
            *(self.q, self.rows),
            block_tables=tables,
            positions=positions,
            scale=self.scale,
            slopes=self.slopes,
        ).view_as(self.q)


def engine_attention(bench: Bench) -> Rows:
    """Gather and SDPA, the engine's way: GB/s of keys and values, by sequences and context."""
    found: Rows = []
    for heads, num_sequences, context in _cases(bench):
        case = Case(bench, heads, num_sequences, context, dim=bench.size(DIM, 16))
        us = bench.time_us(case.gathered, repeats=10, calls=3)
        found.append(_finding(case, us, "gather, SDPA"))
    return found


def triton_attention(bench: Bench) -> Rows:
    """The Triton kernel: first whether it is right, then GB/s. The aim is 75 % of reading alone
    once there is a gigabyte of keys and values."""
    _need_triton(bench)
    check_triton(bench)
    found: Rows = []
    for heads, num_sequences, context in _cases(bench):
        case = Case(bench, heads, num_sequences, context, dim=bench.size(DIM, 16))
        for config in CONFIGS[:1] if bench.is_small else CONFIGS:
            us = bench.time_us(lambda: case.by_triton(*config), repeats=10, calls=3)  # noqa: B023
            found.append(
                _finding(case, us, "split {}, tile {}, {} warps, {} stages".format(*config))
            )
    return found


def check_triton(bench: Bench) -> None:
    """Raises Wrong when the kernel differs from the definition."""
    others = (Heads("MQA 6/1", 6, 1), Heads("GQA 10/2, ALiBi", 10, 2, has_slopes=True))
    for heads in (*KINDS[: 0 if bench.is_small else 2], *others):
        for context in (1, 77, 300):
            case = Case(bench, heads, 2, context, dim=80 if heads.kv_heads == 1 else 64)
            error = (case.by_triton(128, 32, 4, 2).float() - case.exact().float()).abs().max()
            if not error < 0.02:
                raise Wrong(f"{heads.name}, context {context}: off by {float(error):.3g}")


def flash_operator(bench: Bench) -> Rows:
    """torch's own flash attention: does it take a block table, and does it refuse ALiBi's slopes?"""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    refusal = "not asked: no CUDA"
    if bench.is_cuda:
        q = bench.randn(2, 64, 4, 64).half()
        slopes = torch.full((4,), 0.5, device=bench.device, dtype=torch.float32)
        try:
            torch.ops.aten._flash_attention_forward(
                *(q, q, q, None, None, 64, 64, 0.0, True, False), alibi_slopes=slopes
            )
            refusal = "accepted"
        except (RuntimeError, TypeError) as error:
            refusal = f"refused: {str(error).splitlines()[0][:80]}"
    return [
        {
            "torch": torch.__version__,
            "block_table": "block_table" in names,
            "seqused_k": "seqused_k" in names,
            "alibi_slopes": refusal,
        }
    ]


def _cases(bench: Bench) -> list[tuple[Heads, int, int]]:
    if bench.is_small:
        return [(kind, 2, 70) for kind in (Heads("GQA 4/2", 4, 2), Heads("ALiBi 4/4", 4, 4, True))]
    return [
        (kind, num_sequences, context)
        for kind in KINDS
        for num_sequences, context in SHAPES
        if num_sequences * context * 4 * kind.kv_heads * DIM <= MOST_CACHE_BYTES
    ]


def _finding(case: Case, us: float, how: str) -> dict[str, object]:
    return {
        "heads": case.heads.name,
        "B": len(case.q),
        "context": case.context,
        "how": how,
        "us": us,
        "GB/s": case.num_bytes / us / 1e3,
    }


def _need_triton(bench: Bench) -> None:
    if not bench.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unanswered("Triton needs CUDA, or TRITON_INTERPRET=1")
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise Unanswered("triton is not installed") from error
