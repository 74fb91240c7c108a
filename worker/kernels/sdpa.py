"""Paged attention by gathering blocks and calling torch's scaled dot product attention. Any device.

Shapes: T tokens, B sequences, N gathered tokens, g query heads of one key-value head, d features of
a head.
"""

import torch
import torch.nn.functional as F

from worker.kernels.metadata import AttentionMetadata, DecodeGroup, PromptChunk


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    rows: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Write `kv` to the cache and attend; see `PagedAttention.forward`.

    Args:
        q: `[T, heads, d]`.
        kv: `[T, 2 * kv_heads, d]`.
        rows: the layer's cache, `[num_blocks, block_size, 2 * kv_heads, d]`; changed in place.

    Returns:
        `[T, heads * d]`.
    """
    if metadata.entered_blocks is not None:
        # A mask hides the unwritten end of a block from the softmax, but 0 * NaN is NaN: without
        # this, a sequence whose values overflowed would reach the next owner of its blocks.
        rows.index_fill_(0, metadata.entered_blocks, 0)
    rows.view(-1, *kv.shape[1:]).index_copy_(0, metadata.cache_rows, kv)
    view = metadata.views[window]
    parts = [_decode(q, rows, group, scale) for group in view.groups]
    parts += [_prompt(q, kv, rows, chunk, scale) for chunk in view.chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(q: torch.Tensor, rows: torch.Tensor, group: DecodeGroup, scale: float) -> torch.Tensor:
    """One query a sequence. The g heads of a group become g queries of one head, so each key is
    read once."""
    num_rows, (_, num_heads, dim) = group.stop - group.start, q.shape
    both_heads = rows.shape[2]
    kv_heads = both_heads // 2
    gathered = rows.index_select(0, group.blocks).view(num_rows, -1, both_heads, dim)[:, group.keep]
    gathered = gathered.transpose(1, 2)  # [B, 2 kv_heads, N, d]
    queries = q[group.start : group.stop].view(num_rows, kv_heads, -1, dim)
    mask = group.mask
    if mask is not None:
        mask = mask.expand(-1, 1, num_heads // kv_heads, -1)
    attended = F.scaled_dot_product_attention(
        queries, gathered[:, :kv_heads], gathered[:, kv_heads:], attn_mask=mask, scale=scale
    )
    return attended.reshape(num_rows, num_heads * dim)


def _prompt(
    q: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor, chunk: PromptChunk, scale: float
) -> torch.Tensor:
    """Many queries of one sequence. The g heads of a group become a batch over the same keys, which
    are not copied."""
    num_rows, (_, num_heads, dim) = chunk.stop - chunk.start, q.shape
    both_heads = rows.shape[2]
    kv_heads = both_heads // 2
    if chunk.blocks is None:
        keys_values = kv[chunk.start : chunk.stop]
    else:
        keys_values = rows.index_select(0, chunk.blocks).view(-1, both_heads, dim)[: chunk.num_keys]
    group_size = num_heads // kv_heads
    shared = keys_values.transpose(0, 1)[None].expand(
        group_size, -1, -1, -1
    )  # [g, 2 kv_heads, N, d]
    queries = (
        q[chunk.start : chunk.stop].view(num_rows, kv_heads, group_size, dim).permute(2, 1, 0, 3)
    )
    attended = F.scaled_dot_product_attention(
        queries,
        shared[:, :kv_heads],
        shared[:, kv_heads:],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
    )  # [g, kv_heads, n, d]
    return attended.permute(2, 1, 0, 3).reshape(num_rows, num_heads * dim)
