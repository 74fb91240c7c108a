"""The encoder inputs of a step as tensors. Knows no model.

Rows of all inputs are laid end to end. Token i of an input has its place in the input's own blocks,
block encoder_blocks[i // block_size], at i % block_size: there every layer of the decoder keeps the
keys and values that it makes of the encoder's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from worker.engine.plan import SequenceStart
from worker.kernels.metadata import EncoderMetadata


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """What an encoder needs for one step."""

    tokens: torch.Tensor  # [T] int64
    attention: EncoderMetadata


def encoder_batch(
    started: Sequence[SequenceStart], *, block_size: int, device: torch.device
) -> EncoderBatch:
    """The inputs of sequences that start, each of which has one."""
    sizes = [len(start.encoder_tokens) for start in started]
    tables = [np.array(start.encoder_blocks, dtype=np.int64) for start in started]
    places = [np.arange(size) for size in sizes]
    cache_rows = [
        table[place // block_size] * block_size + place % block_size
        for table, place in zip(tables, places, strict=True)
    ]
    entered = [
        table[-1] for table, size in zip(tables, sizes, strict=True) if size % block_size > 0
    ]
    tokens = np.concatenate([np.array(start.encoder_tokens, dtype=np.int64) for start in started])
    return EncoderBatch(
        tokens=torch.from_numpy(tokens).to(device),
        attention=EncoderMetadata(
            bounds=tuple(pairwise(accumulate(sizes, initial=0))),
            cache_rows=torch.from_numpy(np.concatenate(cache_rows)).to(device),
            entered_blocks=torch.tensor(entered, device=device) if entered else None,
        ),
    )
