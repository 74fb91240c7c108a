"""Paged attention: on our own kernels where they fit, else by gathering blocks and calling torch's
scaled dot product attention. Any device.

Shapes: T tokens, B sequences, N gathered tokens, g query heads of one key-value head, d features of
a head.
"""

import torch
import torch.nn.functional as F

from worker.kernels import eager
from worker.kernels.cpu.library import LANES, MAX_HEAD_DIM, CpuKernels, cpu_kernels
from worker.kernels.eager import ScoreRules
from worker.kernels.metadata import (
    AttentionMetadata,
    AttentionView,
    DecodeGroup,
    EncoderMetadata,
    PromptChunk,
)


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    rows: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    rules: ScoreRules | None = None,
) -> torch.Tensor:
    """Write `kv` to the cache and attend; see `PagedAttention.forward` and `attend`."""
    store(kv, rows, metadata)
    return attend(q, kv, rows, metadata, scale=scale, window=window, rules=rules)


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    rows: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    rules: ScoreRules | None = None,
) -> torch.Tensor:
    """Attention over what is in the cache already, `kv` included.

    Args:
        q: `[T, heads, d]`.
        kv: `[T, 2 * kv_heads, d]`.
        rows: the layer's cache, `[num_blocks, block_size, 2 * kv_heads, d]`.
        rules: for the scores; None for all of our own families.

    Returns:
        `[T, heads * d]`.
    """
    view = metadata.views[window]
    kernels = _kernels(q) if rules is None else None
    if kernels is not None:
        return _compiled(kernels, q, kv, rows, view, scale)
    parts = [_decode(q, rows, group, scale, rules) for group in view.groups]
    parts += [_prompt(q, kv, rows, chunk, scale, rules) for chunk in view.chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cross_attention(
    q: torch.Tensor, rows: torch.Tensor, metadata: AttentionMetadata, *, scale: float
) -> torch.Tensor:
    """Attend to the keys and values of each sequence's encoder input, which `store` has written.

    Args:
        q: `[T, heads, d]`.
        rows: as for `paged_attention`; not changed.

    Returns:
        `[T, heads * d]`.
    """
    view = metadata.cross
    assert view is not None, "only a model with an encoder has cross attention"
    kernels = _kernels(q)
    if kernels is not None:
        return _compiled(kernels, q, None, rows, view, scale)
    parts = [_decode(q, rows, group, scale) for group in view.groups]
    parts += [_prompt(q, None, rows, chunk, scale) for chunk in view.chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def encoder_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    metadata: EncoderMetadata,
    *,
    scale: float,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Every token of an encoder input attends to all tokens of that input; no cache.

    Args:
        q: `[T, heads, d]`.
        kv: `[T, 2 * heads, d]`.
        bias: `[heads, L, L]`, of an input at least as long as the longest.

    Returns:
        `[T, heads * d]`.
    """
    num_heads = q.shape[1]
    parts = []
    for start, stop in metadata.bounds:
        queries = q[start:stop].transpose(0, 1)[None]  # [1, heads, n, d]
        keys, values = kv[start:stop].transpose(0, 1)[None].split(num_heads, dim=1)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=bias[None, :, : stop - start, : stop - start],
            scale=scale,
        )
        parts.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def store(
    kv: torch.Tensor, rows: torch.Tensor, metadata: AttentionMetadata | EncoderMetadata
) -> None:
    """Write keys and values `[T, 2 * kv_heads, d]` to the cache."""
    clear_entered(rows, metadata)
    rows.view(-1, *kv.shape[1:]).index_copy_(0, metadata.cache_rows, kv)


def clear_entered(rows: torch.Tensor, metadata: AttentionMetadata | EncoderMetadata) -> None:
    """Zero the blocks that this step begins.

    A mask hides the unwritten end of a block from the softmax, but 0 * NaN is NaN: without this, a
    sequence whose values overflowed would reach the next owner of its blocks.
    """
    if metadata.entered_blocks is not None:
        rows.index_fill_(0, metadata.entered_blocks, 0)


def _kernels(q: torch.Tensor) -> CpuKernels | None:
    dim = q.shape[-1]
    is_fit = dim % LANES == 0 and dim <= MAX_HEAD_DIM
    return cpu_kernels(q.device, q.dtype) if is_fit else None


def _compiled(
    kernels: CpuKernels,
    q: torch.Tensor,
    kv: torch.Tensor | None,
    rows: torch.Tensor,
    view: AttentionView,
    scale: float,
) -> torch.Tensor:
    """On our own kernels, as far as they go. `kv` None: every query sees all keys, of an encoder."""
    num_rows, num_heads, dim = q.shape
    out = torch.empty((num_rows, num_heads * dim), dtype=q.dtype)
    for group in view.groups:
        here = slice(group.start, group.stop)
        seen = group.blocks, group.keep, group.mask
        kernels.paged_decode(out[here], q[here], rows, *seen, scale)
    has_prompts = kv is not None and kernels.can_attend_prompts(dim)
    for chunk in view.chunks:
        here = slice(chunk.start, chunk.stop)
        if has_prompts:
            tokens = kv[here] if chunk.blocks is None else rows
            seen = chunk.blocks, chunk.num_keys, chunk.mask
            kernels.prompt_attention(out[here], q[here], tokens, *seen, scale)
        else:
            out[here] = _prompt(q, kv, rows, chunk, scale)
    return out


def _decode(
    q: torch.Tensor,
    rows: torch.Tensor,
    group: DecodeGroup,
    scale: float,
    rules: ScoreRules | None = None,
) -> torch.Tensor:
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
        mask = mask.expand(-1, -1, num_heads // kv_heads, -1)
    keys, values = gathered[:, :kv_heads], gathered[:, kv_heads:]
    if rules is None:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale
        )
    else:
        sinks = None if rules.sinks is None else rules.sinks.view(kv_heads, -1, 1)
        attended = eager.attention(
            *(queries, keys, values),
            mask=mask,
            is_causal=False,
            scale=scale,
            softcap=rules.softcap,
            sinks=sinks,
        )
    return attended.reshape(num_rows, num_heads * dim)


def _prompt(
    q: torch.Tensor,
    kv: torch.Tensor | None,
    rows: torch.Tensor,
    chunk: PromptChunk,
    scale: float,
    rules: ScoreRules | None = None,
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
    keys, values = shared[:, :kv_heads], shared[:, kv_heads:]
    is_causal = chunk.mask is None
    if rules is None:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=chunk.mask, is_causal=is_causal, scale=scale
        )  # [g, kv_heads, n, d]
    else:
        sinks = rules.sinks
        if sinks is not None:
            sinks = sinks.view(kv_heads, group_size).transpose(0, 1)[:, :, None, None]
        attended = eager.attention(
            *(queries, keys, values),
            mask=chunk.mask,
            is_causal=is_causal,
            scale=scale,
            softcap=rules.softcap,
            sinks=sinks,
        )
    return attended.permute(2, 1, 0, 3).reshape(num_rows, num_heads * dim)
