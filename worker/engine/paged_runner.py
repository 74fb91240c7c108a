"""Runs the tensor part of a step: a model's forward over the paged cache, and the logits that are
asked for."""

from typing import Protocol, runtime_checkable

import torch

from worker.engine.batch import Batch
from worker.engine.encoder_batch import EncoderBatch
from worker.kernels.metadata import AttentionMetadata, EncoderMetadata
from worker.layers.attention import KvCache

# Rows of full-vocabulary logits that exist at once for prompt log-probabilities: 64 x 128k x 4
# bytes are 32 MiB.
LOGITS_ROWS = 64


class PagedModel(Protocol):
    """What a family's model class offers."""

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KvCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class EncoderDecoderModel(PagedModel, Protocol):
    """What the model class of an encoder-decoder family offers. Its call runs the decoder."""

    decoder_start_token: int

    def encode(self, tokens: torch.Tensor, cache: KvCache, metadata: EncoderMetadata) -> None: ...


class PagedRunner:
    """A model and its cache."""

    def __init__(self, model: PagedModel | EncoderDecoderModel, cache: KvCache) -> None:
        self._model = model
        self._cache = cache

    def encode(self, batch: EncoderBatch) -> None:
        """Run the encoder. The cache then holds what the decoder's layers see of its output."""
        self._model.encode(batch.tokens, self._cache, batch.attention)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Run all rows: `[T, H]`. The cache then holds their keys and values."""
        return self._model(batch.tokens, batch.positions, self._cache, batch.attention)

    def sampled_logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the rows that choose a token, `[S, V]`."""
        return self._model.logits(hidden.index_select(0, batch.sampled_rows))

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log softmax of the row's logits at `targets`, both `[n]`, in float32 and in bounded
        pieces."""
        pieces = []
        for rows, wanted in zip(hidden.split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True):
            logits = self._model.logits(rows).float()
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            pieces.append(chosen - logits.logsumexp(dim=-1))
        return torch.cat(pieces)
