"""What every parity test of a family needs: a checkpoint with its oracle, and ways to run ours.

`Checkpoint.engine` is the one door to our side. With `num_shards`, it opens a group of engines that
are threads of this process: the same layers, the same collectives, no processes to wait for.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
)
from tests.checkpoints import Driven, Driver, greedy_oracle, random_prompt, save_checkpoint
from worker.engine.engine import build_engine
from worker.engine.plan import StepPlan, StepResult
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence as Running
from worker.parallel.group import Shard
from worker.settings import WorkerSettings

NUM_TOKENS = 12
TOLERANCE = 1e-4  # of log-probabilities


class Checkpoint:
    """A checkpoint on disk and its oracle; answers are computed once."""

    def __init__(
        self,
        folder: Path,
        config: object,
        *,
        seed: int = 0,
        rewrite: Callable[[Path], None] | None = None,
    ) -> None:
        """`rewrite` changes the files after transformers has saved them."""
        self.folder = folder
        self.oracle = save_checkpoint(folder, config, seed=seed)
        if rewrite is not None:
            rewrite(folder)
        self._answers: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def answer(self, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """The oracle's greedy tokens and their log-probabilities."""
        if prompt not in self._answers:
            self._answers[prompt] = greedy_oracle(self.oracle, prompt, NUM_TOKENS)
        return self._answers[prompt]

    def engine(self, *, num_shards: int = 1, **settings: object) -> object:
        values = dict(
            model_id=str(self.folder), device="cpu", dtype="float32", threads=1, block_size=4
        )
        values |= dict(max_total_tokens=64, max_batch_size=10) | settings
        if num_shards > 1:
            return ThreadedShards(WorkerSettings(**values), num_shards)
        return build_engine(WorkerSettings(**values)).engine

    def driver(self, *, seed: int = 0, **settings: object) -> Driver:
        return Driver(self.engine(**settings), seed=seed)

    def check(self, sequence: Driven) -> None:
        """Tokens equal the oracle's, log-probabilities nearly."""
        tokens, logprobs = self.answer(sequence.prompt)
        assert sequence.tokens == tokens
        torch.testing.assert_close(sequence.logprobs, logprobs, atol=TOLERANCE, rtol=0)


def a_sequence(slot: int, length: int, *, chunk_size: int = 1000, **values: object) -> Driven:
    return Driven(slot, random_prompt(length, seed=length), NUM_TOKENS, chunk_size, **values)


@dataclass(frozen=True, slots=True)
class ThreadShard(Shard):
    """A shard whose peers are threads: collectives over a list that all can see."""

    barrier: threading.Barrier = field(kw_only=True, compare=False)
    posted: list[torch.Tensor] = field(kw_only=True, compare=False)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(sum(self._exchange(x)))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.posted[self.rank] = x.clone()
        self.barrier.wait()
        parts = list(self.posted)
        self.barrier.wait()
        return parts


class ThreadedShards:
    """An engine of several shards in one process; rank 0 answers."""

    def __init__(self, settings: WorkerSettings, size: int) -> None:
        barrier = threading.Barrier(size, timeout=60)
        posted: list[torch.Tensor] = [torch.empty(0)] * size
        self._pool = ThreadPoolExecutor(size)
        self._engines = [
            build_engine(settings, ThreadShard(rank, size, barrier=barrier, posted=posted)).engine
            for rank in range(size)
        ]
        self.layout = self._engines[0].layout

    def step(self, plan: StepPlan) -> StepResult:
        steps = [self._pool.submit(engine.step, plan) for engine in self._engines]
        answers = [step.result() for step in steps]  # of all, so that any error shows
        return answers[0]

    def close(self) -> None:
        self._pool.shutdown()


@dataclass(frozen=True, slots=True)
class Told:
    """What `Scheduler.commit` needs of an output."""

    sequence: Running
    frame: Frame


def run_scheduled(
    engine: object,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_step_tokens: int,
    num_tokens: int = NUM_TOKENS,
    prefix_caching: bool = True,
    decoder_start_token: int | None = None,
    sampling: Sampling = Sampling(),
) -> tuple[list[Driven], Scheduler]:
    """All prompts through the real scheduler, which chunks, shares prefixes and preempts.

    Returns what each came to, in the order of the prompts, and the scheduler with its counters.
    """
    scheduler = Scheduler(
        engine.layout, max_step_tokens=max_step_tokens, prefix_caching=prefix_caching
    )
    told = [Driven(0, prompt, num_tokens, 0) for prompt in prompts]
    names = {f"r{index}": one for index, one in enumerate(told)}
    for name, one in names.items():
        stopping = Stopping(num_tokens, ignore_eos=True)
        request = GenerationRequest(name, "m", one.prompt, sampling, stopping)
        scheduler.add(Running(request, decoder_start_token=decoder_start_token))
    while (plan := scheduler.plan()) is not None:
        outputs = []
        for sampled in engine.step(plan).sampled:
            sequence = scheduler.sequence_at(sampled.slot)
            one = names[sequence.request.id]
            one.tokens.append(sampled.token)
            one.logprobs.append(sampled.logprob)
            finish = Finish(FinishReason.LENGTH, num_tokens) if one.is_done else None
            token = Token(sampled.token, "", sampled.logprob)
            outputs.append(Told(sequence, Frame(tokens=(token,), chain=b"chain", finish=finish)))
        scheduler.commit(plan, outputs)
        scheduler.check()
    return told, scheduler
