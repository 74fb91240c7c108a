"""Caches of several sequences as one batch, for one step: shorter ones are padded at their left, so
that all end at the same place.

    sequence A   . . . a a a | new
    sequence B   b b b b b b | new          . is masked
    sequence C   . c c c c c | new

Nothing is kept between steps: who runs may change with each, and a copy of the caches costs less
than reading all weights again for each sequence.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def is_plain(cache: object) -> bool:
    """Whether a cache holds keys and values of all positions, and nothing else."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Plain caches of one sequence each as one of a batch."""
    joined = DynamicCache()
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys = _stack([layer.keys for layer in layers])
        joined.update(keys, _stack([layer.values for layer in layers]), index)
    return joined


def give_newest(joined: DynamicCache, caches: Sequence[DynamicCache]) -> None:
    """Append the newest position of each sequence to its own cache."""
    for index, layer in enumerate(joined.layers):
        keys, values = layer.keys[:, :, -1:], layer.values[:, :, -1:]
        for row, cache in enumerate(caches):
            cache.update(keys[row : row + 1], values[row : row + 1], index)


def padding_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`[B, longest]`, 1 where a sequence has a token."""
    longest = max(lengths)
    place = torch.arange(longest, device=device)
    first = longest - torch.tensor(lengths, device=device)
    return (place >= first[:, None]).long()


def _stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[1, heads, n, d]` each, to `[B, heads, longest, d]`. What is masked must be finite."""
    _, heads, _, dim = parts[0].shape
    longest = max(part.shape[2] for part in parts)
    stacked = parts[0].new_zeros(len(parts), heads, longest, dim)
    for row, part in enumerate(parts):
        stacked[row, :, longest - part.shape[2] :] = part[0]
    return stacked
