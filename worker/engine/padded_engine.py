"""Runs plans on a model that keeps its own caches. The same interface as our paged engine, so the
scheduler and the service see no difference.

The blocks of a plan are counted and not used: they are the measure of how much fits. A prompt that
comes in chunks runs whole with its last one, because not every model can go on in the middle of a
prompt.
"""

from dataclasses import dataclass, field

import torch

from worker.engine.engine import TokenSampler
from worker.engine.padded_runner import PaddedRunner
from worker.engine.paged_runner import LOGITS_ROWS
from worker.engine.plan import (
    Chunk,
    KvCacheLayout,
    PromptLogprobs,
    Sampled,
    SequenceStart,
    StepPlan,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class ForcedTokens:
    """What a model's generation config says must or must not be chosen."""

    first: int | None = None  # of an encoder-decoder model's answer
    never: tuple[int, ...] = ()

    def apply_(self, logits: torch.Tensor, *, position: int) -> None:
        """Change the logits `[1, V]` of the token to be chosen at a position of the decoder."""
        if self.never:
            logits[:, list(self.never)] = float("-inf")
        if self.first is not None and position == 1:
            value = logits[:, self.first].clone()
            logits.fill_(float("-inf"))
            logits[:, self.first] = value


@dataclass(slots=True)
class _Prompt:
    """Of a slot: tokens that wait for the last chunk, and what is to be scored."""

    scored: tuple[int, ...] = ()
    waiting: list[int] = field(default_factory=list)


class PaddedEngine:
    """An engine (see `worker.engine.loaded.Engine`) around a `PaddedRunner`."""

    def __init__(
        self,
        layout: KvCacheLayout,
        runner: PaddedRunner,
        sampler: TokenSampler,
        forced: ForcedTokens = ForcedTokens(),
    ) -> None:
        self.layout = layout
        self._runner = runner
        self._sampler = sampler
        self._forced = forced
        self._prompts: dict[int, _Prompt] = {}

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Apply the plan's changes, run its chunks, choose the next tokens."""
        for slot in plan.released:
            self._release(slot)
        for start in plan.started:
            self._start(start)
        sampled = [chunk for chunk in plan.chunks if self._is_whole(chunk)]
        if not sampled:
            return StepResult(plan.step, ())
        scored: list[PromptLogprobs] = []
        logits = self._logits(sampled, scored)
        return StepResult(plan.step, self._sample(sampled, logits), tuple(scored))

    def close(self) -> None:
        """Let go of weights and caches."""
        self._runner = self._sampler = None

    def _start(self, start: SequenceStart) -> None:
        self._runner.start(start.slot, start.encoder_tokens)
        self._sampler.start(start)
        self._prompts[start.slot] = _Prompt(start.prompt_tokens if start.prompt_logprobs else ())

    def _release(self, slot: int) -> None:
        self._runner.release(slot)
        self._sampler.release(slot)
        self._prompts.pop(slot, None)

    def _is_whole(self, chunk: Chunk) -> bool:
        """Keep the chunk's tokens; whether they can run now."""
        self._prompts[chunk.slot].waiting += chunk.tokens
        return chunk.is_sampled

    def _logits(self, chunks: list[Chunk], scored: list[PromptLogprobs]) -> torch.Tensor:
        """`[S, V]`: prompts one after another, decoding sequences together if the model allows."""
        decoding = [chunk for chunk in chunks if chunk.start > 0 and self._num_waiting(chunk) == 1]
        rows: dict[int, torch.Tensor] = {}
        if self._runner.is_batching and len(decoding) > 1:
            slots = [chunk.slot for chunk in decoding]
            tokens = [self._prompts[slot].waiting.pop() for slot in slots]
            together = self._runner.run_together(slots, tokens)
            rows = dict(zip(slots, together.split(1), strict=True))
        return torch.cat(
            [
                rows[chunk.slot] if chunk.slot in rows else self._run(chunk, scored)
                for chunk in chunks
            ]
        )

    def _num_waiting(self, chunk: Chunk) -> int:
        return len(self._prompts[chunk.slot].waiting)

    def _run(self, chunk: Chunk, scored: list[PromptLogprobs]) -> torch.Tensor:
        """Logits `[1, V]` of the last token that waits in the chunk's slot; scores the prompt."""
        prompt = self._prompts[chunk.slot]
        tokens, prompt.waiting = prompt.waiting, []
        targets, prompt.scored = prompt.scored[1:], ()
        num_logits = len(tokens) if targets else 1
        logits = self._runner.run(chunk.slot, tokens, num_logits=num_logits)
        if targets:
            logprobs = _logprobs(logits[: len(targets)], targets)
            scored.append(PromptLogprobs(chunk.slot, 1, logprobs))
        return logits[-1:]

    def _sample(self, chunks: list[Chunk], logits: torch.Tensor) -> tuple[Sampled, ...]:
        positions = [chunk.start + len(chunk.tokens) for chunk in chunks]
        for row, position in enumerate(positions):
            self._forced.apply_(logits[row : row + 1], position=position)
        slots = [chunk.slot for chunk in chunks]
        return tuple(self._sampler.sample(logits, slots, positions))


def _logprobs(logits: torch.Tensor, targets: tuple[int, ...]) -> tuple[float, ...]:
    """log softmax of each row at its target, in float32 and in bounded pieces."""
    wanted = torch.tensor(targets, device=logits.device)
    values: list[float] = []
    for rows, pick in zip(logits.split(LOGITS_ROWS), wanted.split(LOGITS_ROWS), strict=True):
        rows = rows.float()
        values += (rows.gather(1, pick[:, None])[:, 0] - rows.logsumexp(dim=-1)).tolist()
    return tuple(values)
