"""Rotary position embedding (Su et al. 2021) and its scaled forms, in the half-split layout of
Hugging Face.

A pair of features (i, i + d/2) of a head turns by the angle position * frequency[i]:

    [a | b]  ->  [a cos - b sin | b cos + a sin]  =  [a | b] * [cos | cos]  +  [b | a] * [-sin |
    sin]

Shapes: T tokens, h heads, d features of a head.
"""

import math
from dataclasses import dataclass

import torch

from worker.kernels.cpu.library import LANES, cpu_kernels

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become rotations."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn, dynamic: positions before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None derives it from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    has_rounded_range: bool = True  # yarn, called `truncate` in the file


@dataclass(frozen=True, slots=True)
class Rotation:
    """Angles of the tokens of one step, shared by all layers: `cos` = [cos | cos], `sin` = [-sin |
    sin], `[T, 1, d]`."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply_(self, x: torch.Tensor) -> None:
        """Turn the heads `x` `[T, h, d]` in place."""
        kernels = cpu_kernels(x.device, x.dtype)
        if kernels is not None and x.shape[-1] % (2 * LANES) == 0:
            return kernels.rotate_(x, self.cos, self.sin)
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        x.mul_(self.cos).addcmul_(swapped, self.sin)
        return None


class RotaryEmbedding:
    """Positions to rotations, in float32 until the last step."""

    def __init__(
        self, config: RopeConfig, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._head_dim = head_dim
        self._dtype = dtype
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._scale = _attention_scale(config)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        angles = positions.float()[:, None] * self._frequencies_at(positions)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return Rotation(
            cos=torch.cat((cos, cos), dim=-1).to(self._dtype)[:, None],
            sin=torch.cat((-sin, sin), dim=-1).to(self._dtype)[:, None],
        )

    def _frequencies_at(self, positions: torch.Tensor) -> torch.Tensor:
        """`[d/2]`, or for a dynamic rope `[T, d/2]`: a token turns as if the text ended with it.

        So a cached key depends on its position alone, never on how long its text became or how it
        was chunked.
        """
        config = self._config
        if config.kind != "dynamic":
            return self._frequencies
        length = (positions + 1).clamp(min=config.original_max_positions).float()
        growth = config.factor * length / config.original_max_positions - (config.factor - 1)
        dim = self._head_dim
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        return 1.0 / (config.theta * growth ** (dim / (dim - 2)))[:, None] ** exponents


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position of each pair of features, `[d/2]` float32."""
    plain = 1.0 / config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(plain, config)
    if config.kind == "yarn":
        return _yarn(plain, config, head_dim)
    return plain  # default; dynamic starts so


def _llama3(plain: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between are blended."""
    turns = (
        config.original_max_positions * plain / (2 * math.pi)
    )  # of each wave in the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(plain: torch.Tensor, config: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023), section 3.2: a ramp over feature pairs between stretched and kept
    waves."""

    def pair_that_turns(turns: float) -> float:
        context = config.original_max_positions
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.has_rounded_range:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)
    return plain / config.factor * stretched + plain * (1 - stretched)


def _attention_scale(config: RopeConfig) -> float:
    """YaRN's temperature, folded into cos and sin; 1 for every other kind."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)
