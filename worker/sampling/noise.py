"""Random numbers as a pure function of (seed, position, token): there is no generator state to keep
or to move.

A token therefore depends on its own request only: not on its neighbours in the batch, the slot, the
worker or the device. Every operation up to the uniform number is integer arithmetic modulo 2**32
(torch wraps int32 silently).

    (seed, position) --murmur3 fmix64--> k0, k1        64 bits a row, on the host
    token            --murmur3 fmix32--> t             once, a table over the vocabulary
    h = fmix32((t ^ k0) * (k1 | 1))                    32 bits a token, each a different one
    u = ((h ^ 2**31) + 1/2) / 2**32                    in (0, 1), finest near 0
    noise = -log1p(-u)                                 standard exponential

Sources: Appleby, MurmurHash3 finalisers; Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", for the idea of a counter instead of a state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_LARGEST_UNIFORM = 1.0 - 2.0**-24  # the float32 below 1, to which the largest hashes would round


def row_keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """Keys `[rows, 2]` int32 for choosing at `positions`; seeds are unsigned 64 bit."""
    words = []
    for seed, position in zip(seeds, positions, strict=True):
        key = _fmix64(seed ^ _fmix64(position + 1))
        words.append((_as_int32(key >> 32), _as_int32((key & 0xFFFFFFFF) | 1)))
    return torch.tensor(words, dtype=torch.int32, device=device).view(-1, 2)


def token_table(vocab_size: int, device: torch.device) -> Tensor:
    """The first round of the hash for every token, `[vocab]` int32."""
    return _fmix32_(torch.arange(vocab_size, dtype=torch.int32, device=device))


def exponential_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard exponential numbers, float32 and > 0.

    `keys` are `row_keys` `[rows, 2]`; `tokens` are entries of the `token_table`, `[vocab]` or
    `[rows, n]`.
    """
    bits = _fmix32_((tokens ^ keys[:, :1]).mul_(keys[:, 1:]))
    # int32 covers -2**31 .. 2**31 - 1: the offset flips the highest bit and centres each of the
    # 2**32 cells. Only the sum is rounded to float32, so numbers near 0, which decide who wins,
    # keep 24 significant bits.
    uniform = bits.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32).float()
    return uniform.clamp_(max=_LARGEST_UNIFORM).neg_().log1p_().neg_()


def _fmix32_(bits: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place; the masks make int32's right shifts unsigned."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _as_int32(0x85EBCA6B)
    bits ^= (bits >> 13) & 0x7FFFF
    bits *= _as_int32(0xC2B2AE35)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _fmix64(value: int) -> int:
    """MurmurHash3's 64-bit finaliser."""
    value &= _MASK64
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & _MASK64
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK64
    return value ^ (value >> 33)


def _as_int32(word: int) -> int:
    """The 32-bit word as two's complement."""
    return word - (1 << 32) if word >= 1 << 31 else word
