"""A Triton kernel for decoding over a paged cache: a candidate, measured before the engine takes it.

A program has one sequence, one key-value head and one split of the context. It loads the query heads
that share the head as one tile, walks its split in tiles with a block-table lookup a token, and
keeps an online softmax in float32. A second kernel merges the splits:

    context   |--- split 0 ---|--- split 1 ---|-- split 2 --|
    program         o, lse          o, lse         o, lse       ->  sum of o · exp(lse - largest)

Splits are of a fixed length in tokens, whatever the batch is: results do not depend on it. The
cache is the engine's, `[num_blocks, block_size, 2 * kv_heads, d]`, keys first.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _split_kernel(
    q, rows, table, lengths, slopes, partial, lse,
    scale, table_stride, num_splits,
    num_heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, dim_padded: tl.constexpr,
    block_size: tl.constexpr, group: tl.constexpr, group_padded: tl.constexpr,
    split: tl.constexpr, tile: tl.constexpr, has_slopes: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    start = number * split
    heads = tl.arange(0, group_padded)
    features = tl.arange(0, dim_padded)
    head_mask = heads < group
    feature_mask = features < dim
    query_at = (sequence * num_heads + kv_head * group + heads)[:, None] * dim + features[None, :]
    query_mask = head_mask[:, None] & feature_mask[None, :]
    queries = tl.load(q + query_at, mask=query_mask, other=0.0)
    largest = tl.full([group_padded], -1e30, tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    sums = tl.zeros([group_padded, dim_padded], tl.float32)
    if has_slopes:
        slope = tl.load(slopes + kv_head * group + heads, mask=head_mask, other=0.0)
    for offset in range(0, split, tile):
        tokens = start + offset + tl.arange(0, tile)
        is_seen = tokens < length
        block = tl.load(
            table + sequence * table_stride + tokens // block_size, mask=is_seen, other=0
        ).to(tl.int64)
        row = (block * block_size + tokens % block_size) * (2 * kv_heads)
        key_at = (row + kv_head)[:, None] * dim + features[None, :]
        kv_mask = is_seen[:, None] & feature_mask[None, :]
        keys = tl.load(rows + key_at, mask=kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)).to(tl.float32) * scale
        if has_slopes:
            scores += slope[:, None] * (tokens - (length - 1)).to(tl.float32)[None, :]
        scores = tl.where(is_seen[None, :], scores, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(is_seen[None, :], tl.exp(scores - new_largest[:, None]), 0.0)
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(rows + key_at + kv_heads * dim, mask=kv_mask, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values).to(tl.float32)
        largest = new_largest
    out_row = (sequence * num_heads + kv_head * group + heads) * num_splits + number
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    tl.store(
        partial + out_row[:, None] * dim + features[None, :], sums / total[:, None], query_mask
    )
    tl.store(lse + out_row, tl.where(is_empty, -1e30, largest + tl.log(total)), head_mask)


@triton.jit
def _merge_kernel(
    partial, lse, out, num_splits,
    dim: tl.constexpr, dim_padded: tl.constexpr, splits_padded: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    splits = tl.arange(0, splits_padded)
    features = tl.arange(0, dim_padded)
    is_split = splits < num_splits
    sizes = tl.load(lse + head * num_splits + splits, mask=is_split, other=-1e30)
    weights = tl.exp(sizes - tl.max(sizes, 0))
    weights = tl.where(is_split, weights, 0.0)
    at = (head * num_splits + splits)[:, None] * dim + features[None, :]
    mask = is_split[:, None] & (features < dim)[None, :]
    parts = tl.load(partial + at, mask=mask, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * dim + features, merged.to(out.dtype.element_ty), features < dim)


def decode(
    q: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    max_length: int,
    slopes: torch.Tensor | None = None,
    split: int = 256,
    tile: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
) -> torch.Tensor:
    """Attention of the newest token of B sequences.

    Args:
        q: `[B, heads, d]`.
        rows: the layer's cache.
        table: `[B, blocks]` int32.
        lengths: `[B]` int32, the newest token included; none is longer than `max_length`.
        slopes: `[heads]` float32, of ALiBi.

    Returns:
        `[B, heads, d]`.
    """
    num_sequences, num_heads, dim = q.shape
    kv_heads = rows.shape[2] // 2
    group = num_heads // kv_heads
    num_splits = -(-max_length // split)
    partial = torch.empty(
        (num_sequences * num_heads * num_splits, dim), dtype=torch.float32, device=q.device
    )
    lse = torch.empty(partial.shape[0], dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    dim_padded = triton.next_power_of_2(dim)
    _split_kernel[(num_sequences, kv_heads, num_splits)](
        q, rows, table, lengths, lse if slopes is None else slopes, partial, lse,
        scale, table.stride(0), num_splits,
        num_heads=num_heads, kv_heads=kv_heads, dim=dim, dim_padded=dim_padded,
        block_size=rows.shape[1], group=group,
        group_padded=max(16, triton.next_power_of_2(group)), split=split, tile=tile,
        has_slopes=slopes is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _merge_kernel[(num_sequences * num_heads,)](
        partial, lse, out, num_splits,
        dim=dim, dim_padded=dim_padded, splits_padded=triton.next_power_of_2(num_splits),
    )  # fmt: skip
    return out
