"""A toy model of 32 layers, one decode step: what a kernel costs in a CUDA graph, and what two fused
kernels save."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.benchmarks.on_gpu.bench import Bench, Rows

HIDDEN, HEADS, KV_HEADS, DIM, INNER = 1024, 8, 2, 128, 2816
NUM_LAYERS = 32


class Layer:
    """The products, norms and cache writes of a llama layer; attention sees one token."""

    def __init__(self, bench: Bench, num_rows: int) -> None:
        hidden, inner = bench.size(HIDDEN, 32), bench.size(INNER, 48)
        self.dim = bench.size(DIM, 8)
        qkv_size = (HEADS + 2 * KV_HEADS) * self.dim
        self.norm = bench.randn(hidden)
        self.qkv = bench.randn(qkv_size, hidden)
        self.output = bench.randn(hidden, HEADS * self.dim)
        self.gate_up = bench.randn(2 * inner, hidden)
        self.down = bench.randn(hidden, inner)
        self.cos = bench.randn(num_rows, 1, self.dim // 2)
        self.cache = bench.randn(4 * num_rows, 2 * KV_HEADS, self.dim)
        self.places = torch.arange(num_rows, device=bench.device) * 4

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """One kernel an operation, as the engine runs it."""
        heads = F.linear(self._normed(x), self.qkv).unflatten(-1, (-1, self.dim))
        turned = heads[:, : HEADS + KV_HEADS]
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat(
            (first * self.cos - second * self.cos, second * self.cos + first * self.cos), dim=-1
        )
        self.cache.index_copy_(0, self.places, heads[:, HEADS:])
        x = x + F.linear(turned[:, :HEADS].flatten(1), self.output)
        gate, up = F.linear(self._normed(x), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def products_only(self, x: torch.Tensor) -> torch.Tensor:
        """What cannot be fused away: four matrix products."""
        y = F.linear(x, self.qkv)[:, : HEADS * self.dim]
        x = F.linear(y, self.output)
        inner = self.down.shape[1]
        return F.linear(F.linear(x, self.gate_up)[:, :inner], self.down)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm)


def step_graph(bench: Bench) -> Rows:
    """Microseconds of a step of 32 layers, and of one kernel: launched one by one, replayed as a
    graph, with Inductor's fusion, and of the products alone. The difference of the last two is the
    most that fusing norms, rotary and cache writes could still save."""
    num_layers = bench.size(NUM_LAYERS, 2)
    found: Rows = []
    for num_rows in (1, 32):
        layers = [Layer(bench, num_rows) for _ in range(num_layers)]
        x = bench.randn(num_rows, bench.size(HIDDEN, 32))
        for name, step in _ways(bench, layers, x).items():
            us = bench.time_us(step, repeats=10)
            num_kernels = _num_kernels(bench, step)
            each = us / num_kernels if num_kernels else ""
            found.append(
                {
                    "M": num_rows,
                    "way": name,
                    "us": us,
                    "kernels": num_kernels or "",
                    "us each": each,
                }
            )
    return found


def _ways(bench: Bench, layers: list[Layer], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    def through(run: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def step() -> torch.Tensor:
            y = x
            for layer in layers:
                y = run(layer, y)
            return y

        return step

    plain, products = through(Layer.plain), through(Layer.products_only)
    ways = {"launched": plain, "graph": bench.captured(plain)}
    if bench.is_cuda:
        # One layer is compiled, and runs as all of them.
        fused = torch.compile(Layer.plain, dynamic=False)
        ways["graph, fused by Inductor"] = bench.captured(through(fused))
    return ways | {"graph, products only": bench.captured(products)}


def _num_kernels(bench: Bench, step: Callable[[], object]) -> int:
    """As a profiler counts them; 0 without CUDA."""
    if not bench.is_cuda:
        return 0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        bench.synchronize()
    events = profiler.events()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
