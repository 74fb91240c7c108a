"""How many tokens the KV cache holds, and its memory. Knows sizes, not models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.machine_limits import available_memory_bytes
from worker.engine.plan import KvCacheLayout
from worker.layers.attention import KvCache

# Of the free memory. What is larger would not stay: weights and KV cache take its place.
FILE_CACHE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token needs on one shard."""

    num_layers: int
    num_kv_heads: int  # on this shard
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one token needs in a cache that is not ours."""

    token_bytes: int


def plan_kv_cache(
    shape: KvShape | StateShape,
    *,
    block_size: int,
    num_slots: int,
    max_total_tokens: int,
    min_total_tokens: int | None = None,
    tables_per_sequence: int = 1,
    max_batch_total_tokens: int | None,
    memory_fraction: float,
    free_bytes: int,
) -> KvCacheLayout:
    """How many blocks to allocate: what was asked for, or what fits, but never more than all slots
    could fill.

    A sequence may divide its tokens among several block tables, each of which ends in a block that
    it does not fill: an encoder's input and the decoder's tokens have one each.

    Args:
        min_total_tokens: what fits must hold one sequence of so many tokens; the default is
            `max_total_tokens`. See `longest_sequence`.

    Raises:
        ValueError: not even one such sequence would fit.
    """
    least_tokens = max_total_tokens if min_total_tokens is None else min_total_tokens
    blocks_per_sequence = -(-max_total_tokens // block_size) + tables_per_sequence - 1
    least_blocks = -(-least_tokens // block_size) + tables_per_sequence - 1
    budget_bytes = int(free_bytes * memory_fraction)
    affordable = budget_bytes // (block_size * shape.token_bytes)
    if max_batch_total_tokens is not None:
        wanted = max_batch_total_tokens // block_size
        if wanted < least_blocks:
            raise ValueError(
                f"`max_batch_total_tokens` must hold one sequence of {least_tokens} tokens, in "
                f"whole blocks of {block_size}. Given: {max_batch_total_tokens}. "
                "Raise it or lower `max_total_tokens`"
            )
        if wanted * block_size * shape.token_bytes > free_bytes:
            raise ValueError(
                f"`max_batch_total_tokens` of {max_batch_total_tokens} needs "
                f"{wanted * block_size * shape.token_bytes / 2**20:.0f} MiB of KV cache; "
                f"{free_bytes / 2**20:.0f} MiB are free. Lower it, or `max_total_tokens`"
            )
    else:
        wanted = min(affordable, num_slots * blocks_per_sequence)
        if wanted < least_blocks:
            raise ValueError(
                f"the KV cache must hold one sequence of {least_tokens} tokens, "
                f"which needs {least_blocks * block_size * shape.token_bytes / 2**20:.0f} "
                f"MiB; `memory_fraction` {memory_fraction} of {free_bytes / 2**20:.0f} MiB free "
                f"is {budget_bytes / 2**20:.0f} MiB. "
                "Lower `max_total_tokens` or raise `memory_fraction`"
            )
    return KvCacheLayout(num_blocks=wanted, block_size=block_size, num_slots=num_slots)


def longest_sequence(layout: KvCacheLayout, *, tables_per_sequence: int = 1) -> int:
    """How many tokens of a single sequence always fit, however its tables divide them."""
    return (layout.num_blocks - tables_per_sequence + 1) * layout.block_size


def allocate_kv_cache(layout: KvCacheLayout, shape: KvShape, device: torch.device) -> KvCache:
    """The cache, all zeros: what a mask hides is read nevertheless, and must be finite."""
    sizes = (layout.num_blocks, layout.block_size, 2 * shape.num_kv_heads, shape.head_dim)
    if device.type != "cpu":
        layers = [
            torch.zeros(sizes, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)
        ]
    else:
        layers = [_untouched_zeros(sizes, shape.dtype) for _ in range(shape.num_layers)]
    return KvCache(tuple(layers))


def free_memory_bytes(device: torch.device) -> int:
    """What this process may still take, on the device; for a CPU also within its control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


def has_room_for_file_cache(files: Sequence[Path]) -> bool:
    """Whether these files may stay in the kernel's cache, where the next start finds them."""
    num_bytes = sum(file.stat().st_size for file in files)
    return num_bytes <= FILE_CACHE_SHARE * free_memory_bytes(torch.device("cpu"))


def _untouched_zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only when they are written: calloc's pages, where torch.zeros would
    touch each."""
    num_bytes = int(np.prod(sizes)) * dtype.itemsize
    raw = np.zeros(num_bytes + 64, dtype=np.uint8)
    offset = -raw.ctypes.data % 64  # to a cache line
    return torch.from_numpy(raw[offset : offset + num_bytes]).view(dtype).view(sizes)
