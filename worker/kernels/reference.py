"""Paged attention as its definition says, one head of one token at a time, in float64. The oracle
of the tests."""

from collections.abc import Sequence

import torch


def attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    *,
    block_tables: Sequence[Sequence[int]],
    positions: Sequence[int],
    scale: float,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ scale + bias) v for tokens whose keys and values are already in the cache.

    Args:
        q: `[T, heads, d]`.
        rows: `[num_blocks, block_size, 2 * kv_heads, d]`, see `worker/layers/attention.py`.
        block_tables: the blocks of each token's sequence, in order.
        positions: of each token in its sequence; it sees positions up to its own.
        window: how many newest positions it sees, all if None.
        slopes: `[heads]`, of ALiBi: the bias is slope * (key position - query position).

    Returns:
        `[T, heads * d]` in the type of `q`.
    """
    block_size, kv_heads = rows.shape[1], rows.shape[2] // 2
    num_heads = q.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for token, (table, position) in enumerate(zip(block_tables, positions, strict=True)):
        first = max(0, position - window + 1) if window else 0
        seen = [
            rows[table[p // block_size], p % block_size].double()
            for p in range(first, position + 1)
        ]
        history = torch.stack(seen)  # [N, 2 kv_heads, d]
        for head in range(num_heads):
            kv_head = head * kv_heads // num_heads
            keys, values = history[:, kv_head], history[:, kv_heads + kv_head]
            scores = keys @ q[token, head].double() * scale
            if slopes is not None:
                distances = torch.arange(first - position, 1, device=q.device)
                scores = scores + slopes[head].double() * distances
            weights = torch.softmax(scores, dim=0)
            out[token, head] = weights @ values
    return out.flatten(1).to(q.dtype)
