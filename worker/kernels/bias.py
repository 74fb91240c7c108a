"""Biases on attention scores that depend on how far a key is from its query (T5, ALiBi). They
become part of a step's masks, once for all layers."""

from collections.abc import Callable
from dataclasses import replace

import torch

from worker.kernels.metadata import AttentionMetadata, AttentionView, DecodeGroup, PromptChunk

DistanceBias = Callable[[torch.Tensor], torch.Tensor]
"""Position of the query less position of the key, `[...]` int64, to a bias `[heads, ...]`.

It must answer for any distance; what it says of keys after the query (< 0) is masked.
"""


def with_distance_bias(
    metadata: AttentionMetadata, positions: torch.Tensor, bias: DistanceBias, num_kv_heads: int
) -> AttentionMetadata:
    """The metadata with a bias in its masks, for layers without a window.

    Args:
        positions: of the step's tokens, `[T]`.
        num_kv_heads: on this shard; the bias' heads are in the order of the queries' heads.
    """
    view = metadata.views[None]
    biased = AttentionView(
        tuple(_group(group, positions, bias, num_kv_heads) for group in view.groups),
        tuple(_chunk(chunk, positions, bias, num_kv_heads) for chunk in view.chunks),
    )
    return replace(metadata, views={None: biased})


def _group(
    group: DecodeGroup, positions: torch.Tensor, bias: DistanceBias, num_kv_heads: int
) -> DecodeGroup:
    keys = torch.arange(group.keep.start, group.keep.stop, device=positions.device)
    values = bias(positions[group.start : group.stop, None] - keys)  # [heads, B, N]
    mask = values.transpose(0, 1).unflatten(1, (num_kv_heads, -1))  # [B, kv_heads, g, N]
    return replace(group, mask=mask if group.mask is None else mask + group.mask)


def _chunk(
    chunk: PromptChunk, positions: torch.Tensor, bias: DistanceBias, num_kv_heads: int
) -> PromptChunk:
    keys = torch.arange(chunk.num_keys, device=positions.device)
    distance = positions[chunk.start : chunk.stop, None] - keys
    values = bias(distance)  # [heads, n, N]
    if chunk.mask is None:
        values.masked_fill_(distance < 0, float("-inf"))
    else:
        values += chunk.mask
    return replace(chunk, mask=values.unflatten(0, (num_kv_heads, -1)).transpose(0, 1))
