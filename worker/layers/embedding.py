"""Embedding and output head, divided among shards by rows of the vocabulary; learned positions.

    10 tokens, 4 shards:   shard 0: 0-2    shard 1: 3-5    shard 2: 6-8    shard 3: 9, padding

Shapes: T tokens, H hidden size, V vocabulary, R rows of one shard.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from worker.layers.build import Build
from worker.layers.linear import Linear
from worker.weights.pieces import Piece, whole


class VocabularyEmbedding(nn.Module):
    """Token ids `[T]` to vectors `[T, H]`. A shard answers with zeros for tokens of the others;
    then all are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, build: Build) -> None:
        super().__init__()
        self.shard = build.shard
        self.num_rows, self.pieces = _vocabulary_rows(vocab_size, hidden_size, build)
        self.weight = build.parameter(self.num_rows, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.shard.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.shard.rank * self.num_rows
        is_elsewhere = (local < 0) | (local >= self.num_rows)
        vectors = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        return self.shard.all_reduce(vectors.masked_fill_(is_elsewhere[:, None], 0))


class VocabularyHead(Linear):
    """Hidden states `[T, H]` to logits `[T, V]`, gathered from all shards."""

    def __init__(self, hidden_size: int, vocab_size: int, build: Build) -> None:
        num_rows, pieces = _vocabulary_rows(vocab_size, hidden_size, build)
        build = replace(build, linear_backend=build.head_backend)
        super().__init__(hidden_size, num_rows, build)
        self.shard = build.shard
        self.vocab_size = vocab_size
        self.pieces = pieces

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shard.all_gather(self.product(x))[:, : self.vocab_size]


class LearnedPositions(nn.Module):
    """Positions `[T]` to vectors `[T, H]`, the same on every shard; so add them after the sum of
    the token vectors. The table's first `offset` rows belong to no position (OPT)."""

    def __init__(
        self, num_positions: int, hidden_size: int, build: Build, *, offset: int = 0
    ) -> None:
        super().__init__()
        self.offset = offset
        self.weight = build.parameter(num_positions + offset, hidden_size)
        self.pieces = {"weight": whole((num_positions + offset, hidden_size))}

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions + self.offset if self.offset else positions, self.weight)


def _vocabulary_rows(
    vocab_size: int, hidden_size: int, build: Build
) -> tuple[int, dict[str, dict[str, Piece]]]:
    num_rows = -(-vocab_size // build.shard.size)
    first = min(build.shard.rank * num_rows, vocab_size)
    last = min(first + num_rows, vocab_size)
    every = slice(0, hidden_size)
    piece = Piece(
        (vocab_size, hidden_size), (slice(first, last), every), (slice(0, last - first), every)
    )
    return num_rows, {"weight": {"": piece}}
