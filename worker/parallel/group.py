"""Which part of the model this process holds, and the collectives that layers use. Knows no plans
and no models."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import FleetError

# A collective of a step: all shards are in the same step, so a peer that is this late is gone. Ours
# is the second line: the launcher sees a stuck shard much earlier, in `beats.py`.
STEP_TIMEOUT = timedelta(seconds=30)
# Between steps a shard waits for the next plan, and after loading for the slowest disk.
IDLE_TIMEOUT = timedelta(days=365)
JOIN_TIMEOUT = timedelta(minutes=10)
# Rows of a step that generates one token, and of a long prompt: by size NCCL chooses among several
# ways, and it connects each when that is first taken.
WARM_UP_ROWS = (1, 4096)
WARM_UP_WIDTH = 64


class PeerLost(FleetError):
    """Another shard of this worker is gone."""


def _unwatched() -> None:
    """Nobody asks for this shard's progress."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `rank` of `size`. With size 1 the collectives return their argument and need no process
    group.

    Args:
        local_rank: among the shards of this machine; also the number of its GPU.
        local_size: shards that share this machine's cores and memory.
        control: a gloo group for what is no tensor of the model; it waits as long as it takes.
        progress: called after every collective, so that a watcher can tell a long step from a stuck
            one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    progress: Callable[[], None] = field(default=_unwatched, repr=False, compare=False)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all shards, in place. Raises PeerLost."""
        if self.size > 1:
            self._with_peers(dist.all_reduce, x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every shard, in the order of ranks, joined along the last dimension; all have one
        shape. Raises PeerLost."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._with_peers(dist.all_gather, parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def minimum(self, value: int) -> int:
        """The smallest `value` of all shards; waits for the last of them, however long it loads."""
        if self.control is None:
            return value
        smallest = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.control)
        return int(smallest)

    def warm_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Do once what layers do in every step, and wait for it; all shards must. On CUDA the first
        time takes seconds (NCCL's communicators, cuBLAS), which in a step would look like a stuck
        shard. Raises PeerLost."""
        if self.size == 1:
            return
        weight = torch.zeros(WARM_UP_WIDTH, WARM_UP_WIDTH, dtype=dtype, device=device)
        for num_rows in WARM_UP_ROWS:
            x = torch.zeros(num_rows, WARM_UP_WIDTH, dtype=dtype, device=device)
            self.all_gather(self.all_reduce(x @ weight)).sum().item()

    def divide(self, total: int, what: str) -> int:
        """This shard's share of `total`. Raises ValueError if the shards cannot have equal
        shares."""
        if total % self.size:
            raise ValueError(
                f"{what} must be divisible by the number of shards. Given: {total} and {self.size}"
            )
        return total // self.size

    def _with_peers(self, collective: Callable[..., object], *arguments: object) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise PeerLost(f"shard {self.rank} of {self.size} lost a peer: {reason}") from error
        self.progress()


def join_group(
    rank: int,
    size: int,
    address: tuple[str, int],
    *,
    has_cuda: bool,
    local_size: int | None = None,
    listener: socket.socket | None = None,
    progress: Callable[[], None] = _unwatched,
) -> Shard:
    """Meet the other shards at `address` (host and port of rank 0) and become one of them.

    Tensors of the model travel by NCCL on CUDA and by gloo on CPU. Ranks are numbered machine by
    machine.

    Args:
        local_size: shards of this machine; the default is all.
        listener: rank 0 only: a socket that is bound to `address`. Without one, `address` is bound.

    Raises:
        RuntimeError: the others did not come within ten minutes.
    """
    local_size = size if local_size is None else local_size
    store = dist.TCPStore(
        *address,
        world_size=size,
        is_master=rank == 0,
        timeout=JOIN_TIMEOUT,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    if has_cuda:
        torch.cuda.set_device(rank % local_size)
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    return Shard(rank, size, rank % local_size, local_size, control, progress)


def leave_group() -> None:
    """Part from the others in good order. Never after a failure: it could wait for a dead peer."""
    dist.destroy_process_group()
