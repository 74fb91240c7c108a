"""Attention written out, for scores with rules that torch's scaled dot product attention does not
know. Same shapes and meaning as there, slower, and exact to the models' own code."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """What happens to scores before the softmax, besides scale and mask.

    `softcap` bounds them: cap * tanh(score / cap) (Gemma 2). `sinks`, `[heads]`, are scores of a key
    without a value, which takes its share of every softmax (gpt-oss).
    """

    softcap: float | None = None
    sinks: torch.Tensor | None = None


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(cap(q kᵀ scale) + mask, sinks) v.

    Args:
        queries: `[..., n, d]`.
        keys: `[..., N, d]`; `values` likewise.
        mask: additive, broadcast to `[..., n, N]`.
        is_causal: with n = N: no query sees what follows it.
        sinks: broadcast to `[..., n, 1]`.
    """
    scores = queries @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(is_later, float("-inf"))
    if mask is not None:
        scores = scores + mask
    num_keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return weights[..., :num_keys] @ values
