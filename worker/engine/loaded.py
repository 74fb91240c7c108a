"""What loading a model yields: something that runs steps, and the facts that a worker announces. No
torch.

The service works with these two names only, so it cannot tell our paged engine from the echo model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.engine.plan import KvCacheLayout, StepPlan, StepResult


class Engine(Protocol):
    """Runs plans on one shard. Not thread-safe: one thread calls `step`, one plan at a time."""

    @property
    def layout(self) -> KvCacheLayout:
        """How much fits. Fixed once the engine is built."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan and block until its tokens are chosen."""
        ...

    def close(self) -> None:
        """Give memory and processes back. No step may follow; closing twice is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine with the facts of its model, as they go into the model card.

    `max_total_tokens` is the longest prompt plus answer; `tokenizer_json` is the content of a
    `tokenizer.json`; `served_by` names the path that runs the model: "engine", "transformers",
    "transformers-padded" or "echo". Without `has_paged_cache` there are no blocks that sequences
    could share. `has_spare_memory` tells whether its cache may grow, see `BlockManager`.
    """

    engine: Engine
    layout: KvCacheLayout
    tokenizer_json: str
    architecture: str
    served_by: str
    dtype: str
    device: str
    vocab_size: int
    max_total_tokens: int
    eos_tokens: tuple[int, ...]
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str = ""
    quantization: str = ""
    revision: str = ""
    prompt_style: str = ""  # see `worker/models/text_style.py`
    keeps_special_tokens: bool = False
    # What the decoder of an encoder-decoder model begins with; None for all other models.
    decoder_start_token: int | None = None
    has_paged_cache: bool = True
    has_spare_memory: Callable[[], bool] = lambda: True

    @property
    def is_encoder_decoder(self) -> bool:
        return self.decoder_start_token is not None
