"""Matrix products: how near to the memory's speed they are, and whether a row's result depends on
its place in the batch."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.benchmarks.on_gpu.bench import Bench, Rows

ROWS = (1, 8, 32, 64)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (250_880, 4096))  # [outputs, inputs]
FIXED_ROWS = 64


def shapes(bench: Bench) -> list[tuple[int, int]]:
    return [(96, 64), (64, 96)] if bench.is_small else list(SHAPES)


def bandwidth(bench: Bench) -> Rows:
    """Reading alone, then products of a bfloat16 weight with M rows: GB/s of the weight, and which
    share of reading alone that is. The aim is 85 %."""
    read_us, read_gbs = _reading(bench)
    found: Rows = [{"what": "reading", "M": "", "us": read_us, "GB/s": read_gbs, "share": 1.0}]
    for num_outputs, num_inputs in shapes(bench):
        copies = _copies(bench, num_outputs, num_inputs)
        for num_rows in ROWS:
            x = bench.randn(num_rows, num_inputs)
            us = bench.time_us(_in_turn(copies, x))
            gbs = copies[0].nbytes / us / 1e3
            name = f"{num_outputs} x {num_inputs}"
            found.append(
                {"what": name, "M": num_rows, "us": us, "GB/s": gbs} | {"share": gbs / read_gbs}
            )
    return found


def row_independence(bench: Bench) -> Rows:
    """The same row at every place of a batch of 64, among other rows: are its results bit for bit
    the same?"""
    found: Rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for num_outputs, num_inputs in shapes(bench):
            weight = bench.randn(num_outputs, num_inputs, dtype=dtype)
            row = bench.randn(1, num_inputs, dtype=dtype)
            results = []
            for place in (0, 1, 17, FIXED_ROWS - 1):
                x = bench.randn(FIXED_ROWS, num_inputs, dtype=dtype)
                x[place] = row
                results.append(F.linear(x, weight)[place])
            is_same = all(torch.equal(results[0], other) for other in results[1:])
            name = f"{num_outputs} x {num_inputs}"
            found.append({"shape": name, "type": str(dtype)[6:], "same bits": is_same})
    return found


def _reading(bench: Bench) -> tuple[float, float]:
    """Microseconds and GB/s of reading 2 GiB that no cache holds."""
    values = torch.zeros(bench.size(2**28, 2**10), dtype=torch.int64, device=bench.device)
    us = bench.time_us(values.amax, calls=3)
    return us, values.nbytes / us / 1e3


def _copies(bench: Bench, num_outputs: int, num_inputs: int) -> list[torch.Tensor]:
    """As many weights as do not fit into the device's cache together, as those of a model's layers
    do not."""
    num_bytes = 2 * num_outputs * num_inputs
    count = 1 if bench.is_small else max(1, -(-512 * 2**20 // num_bytes))
    return [bench.randn(num_outputs, num_inputs) for _ in range(count)]


def _in_turn(weights: list[torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    turns = itertools.cycle(weights)
    return lambda: F.linear(x, next(turns))
