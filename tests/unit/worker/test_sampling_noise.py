"""The sampler's noise: its arithmetic, and that neighbours have nothing in common."""

import math

import numpy as np
import pytest
import torch

from tests.sampling import CPU
from worker.sampling.noise import exponential_noise, row_keys, token_table


def test_hash_is_murmur3_in_exact_integer_arithmetic():
    """Recomputed with Python integers: what any device must give."""

    def fmix32(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    def fmix64(h):
        h = ((h ^ (h >> 33)) * 0xFF51AFD7ED558CCD) % 2**64
        h = ((h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
        return h ^ (h >> 33)

    tokens = [0, 1, 2, 17, 49151]
    for seed in (0, 1, 2**63, 2**64 - 1):
        for position in (0, 1, 131072):
            key = fmix64(seed ^ fmix64(position + 1))
            keys = row_keys([seed], [position], CPU)
            noise = exponential_noise(keys, token_table(49152, CPU)[tokens])[0]
            for token, value in zip(tokens, noise.tolist(), strict=True):
                h = fmix32(((fmix32(token) ^ (key >> 32)) * (key % 2**32 | 1)) % 2**32)
                uniform = np.float32(((h ^ 2**31) + 0.5) / 2**32)
                assert value == pytest.approx(-math.log1p(-float(uniform)), rel=1e-6)


def test_uniform_numbers_stay_inside_the_interval():
    """For every hash, the two extremes too."""
    every = exponential_noise(row_keys(range(200), [1] * 200, CPU), token_table(49152, CPU))
    assert every.min() > 0
    assert every.isfinite().all()

    def unfmix32(h):
        h ^= h >> 16
        h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
        h ^= (h >> 13) ^ (h >> 26)
        h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
        return h ^ (h >> 16)

    entries = np.array([[unfmix32(2**31), unfmix32(2**31 - 1)]], dtype=np.uint32).view(np.int32)
    neutral_key = torch.tensor([[0, 1]], dtype=torch.int32)
    smallest, largest = exponential_noise(neutral_key, torch.from_numpy(entries))[0].tolist()
    assert smallest == pytest.approx(0.5 / 2**32, rel=1e-6)
    assert largest == pytest.approx(24 * math.log(2), rel=1e-6)


def test_noise_of_neighbours_is_uncorrelated():
    keys = row_keys([11] * 400, range(400), CPU)
    noise = exponential_noise(keys, token_table(1000, CPU)).double()
    by_position = torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1]
    by_token = torch.corrcoef(torch.stack((noise[:, :-1].flatten(), noise[:, 1:].flatten())))[0, 1]
    by_seed = exponential_noise(
        row_keys([12] * 400, range(400), CPU), token_table(1000, CPU)
    ).double()
    by_seed = torch.corrcoef(torch.stack((noise.flatten(), by_seed.flatten())))[0, 1]
    assert max(abs(by_position), abs(by_token), abs(by_seed)) < 5 / math.sqrt(399_000)
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)
