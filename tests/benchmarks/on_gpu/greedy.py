"""Our models without the engine around them: weights, paged cache, scheduler, and the largest logit.
It needs torch and what transformers brings, and nothing of settings, queue or grammars.
"""

from dataclasses import dataclass
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
from worker.engine.batch import BlockTables
from worker.engine.memory import KvShape, allocate_kv_cache
from worker.engine.paged_runner import EncoderDecoderModel, PagedRunner
from worker.engine.plan import KvCacheLayout, Sampled, StepPlan
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.layers.build import Build
from worker.layers.linear import local_kv_heads
from worker.models.registry import model_class
from worker.parallel.group import Shard
from worker.quantization.registry import linear_backends
from worker.weights.files import ModelFolder
from worker.weights.loader import load_weights

BLOCK_SIZE = 8
MAX_TOTAL_TOKENS = 96
NUM_SLOTS = 8
STEP_TOKENS = 23  # so that prompts come in pieces


@dataclass(slots=True)
class Answer:
    """What came of a prompt; `first` is the distribution of its first token, `[V]` in float32."""

    tokens: list[int]
    logprobs: list[float]
    first: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Told:
    """What `Scheduler.commit` needs."""

    sequence: Sequence
    frame: Frame


class Greedy:
    """A checkpoint on a device, which continues prompts by the likeliest tokens."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        quantize: str | None = None,
        shard: Shard = Shard(),
    ) -> None:
        files = ModelFolder(folder)
        made = model_class(files.config()["architectures"])
        config = made.read_config(files.config())
        linear, head = linear_backends(quantize)
        build = Build(dtype, device, shard, linear_backend=linear, head_backend=head)
        self._model = made(config, build).eval()
        load_weights(self._model, made.weight_names(config), files.weight_files(), device)
        kv_heads = local_kv_heads(config.num_kv_heads, build)[0]
        shape = KvShape(config.num_layers, kv_heads, config.head_dim, dtype)
        num_blocks = 2 * NUM_SLOTS * MAX_TOTAL_TOKENS // BLOCK_SIZE
        self._layout = KvCacheLayout(num_blocks, BLOCK_SIZE, NUM_SLOTS)
        self._runner = PagedRunner(self._model, allocate_kv_cache(self._layout, shape, device))
        self._tables = BlockTables(
            self._layout,
            max_total_tokens=MAX_TOTAL_TOKENS,
            windows=config.windows,
            dtype=dtype,
            device=device,
            token_bytes=shape.token_bytes // shape.num_layers,
            limits=None,
        )

    @property
    def _start_token(self) -> int | None:
        is_encoder_decoder = isinstance(self._model, EncoderDecoderModel)
        return self._model.decoder_start_token if is_encoder_decoder else None

    def answer(self, prompts: list[tuple[int, ...]], num_tokens: int) -> list[Answer]:
        """All prompts together, batched and in chunks by the real scheduler."""
        scheduler = Scheduler(self._layout, max_step_tokens=STEP_TOKENS)
        answers = {str(index): Answer([], []) for index in range(len(prompts))}
        for name, prompt in zip(answers, prompts, strict=True):
            stopping = Stopping(num_tokens, ignore_eos=True)
            request = GenerationRequest(name, "m", prompt, Sampling(), stopping)
            scheduler.add(Sequence(request, decoder_start_token=self._start_token))
        while (plan := scheduler.plan()) is not None:
            told = []
            for sampled, distribution in self.step(plan):
                sequence = scheduler.sequence_at(sampled.slot)
                answer = answers[sequence.request.id]
                answer.tokens.append(sampled.token)
                answer.logprobs.append(sampled.logprob)
                answer.first = distribution if answer.first is None else answer.first
                is_last = len(answer.tokens) == num_tokens
                finish = Finish(FinishReason.LENGTH, num_tokens) if is_last else None
                token = Token(sampled.token, "", sampled.logprob)
                told.append(_Told(sequence, Frame(tokens=(token,), chain=b"chain", finish=finish)))
            scheduler.commit(plan, told)
        return list(answers.values())

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> list[tuple[Sampled, torch.Tensor]]:
        """As `PagedEngine.step`, with the log-probabilities of all tokens, on the CPU."""
        for slot in plan.released:
            self._tables.clear(slot)
        for start in plan.started:
            self._tables.start(start)
        encoder_batch = self._tables.encoder_batch(plan.started)
        if encoder_batch is not None:
            self._runner.encode(encoder_batch)
        if not plan.chunks:
            return []
        batch = self._tables.batch(plan.chunks)
        hidden = self._runner.hidden(batch)
        if not batch.sampled_slots:
            return []
        logits = self._runner.sampled_logits(batch, hidden).float().log_softmax(-1).cpu()
        tokens = logits.argmax(-1).tolist()
        return [
            (Sampled(slot, token, float(row[token])), row)
            for slot, token, row in zip(batch.sampled_slots, tokens, logits, strict=True)
        ]
