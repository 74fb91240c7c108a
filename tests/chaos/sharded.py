"""A tiny random llama in two shards: the model of the rows in which one rank is lost. Its fault-free answer is the oracle."""

import random
import tempfile
from pathlib import Path
from typing import Self

from tests.chaos.arena import Arena
from tests.chaos.client import ChaosClient


class ShardedModel:
    """Use as `async with ShardedModel() as model`; makes the checkpoint."""

    prompt = " ".join(f"w{3 + number % 190}" for number in range(1200))  # takes a while to prefill
    num_tokens = 64

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-model-")
        self._answer: list[int] = []

    async def __aenter__(self) -> Self:
        import transformers

        from tests.checkpoints import VOCAB_SIZE, save_checkpoint

        config = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        save_checkpoint(self._path, config)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def arena(self, draw: random.Random) -> Arena:
        """One worker of two shards: its own launcher must bring it back."""
        options = ("--num-shard", "2", "--device", "cpu", "--dtype", "float32")
        return Arena(
            draw,
            num_gateways=1,
            num_workers=1,
            model=str(self._path),
            worker_options=options,
            sabotage="nothing",
        )

    async def learn(self, arena: Arena) -> None:
        """What it says when nothing breaks."""
        length = 2 * self.num_tokens
        client = ChaosClient(arena.urls, arena.draw)
        seen = await client.run(self.prompt, max_new_tokens=length, is_resuming=False)
        self._answer = [token.id for _, frame in seen.seen.frames for token in frame.tokens]
        assert len(self._answer) == length, f"{len(self._answer)} tokens, error {seen.seen.error!r}"

    def says(self, prompt: tuple[int, ...], tokens: list[int]) -> set[int]:
        """The one token that may follow, as an oracle for `violations`."""
        return {self._answer[len(tokens) - len(prompt)]}

    @property
    def _path(self) -> Path:
        return Path(self._folder.name) / "tiny"
