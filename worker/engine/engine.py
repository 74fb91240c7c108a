"""Builds everything on a shard; then `step(plan)`, on the one engine thread. Knows no requests, no
text and no Redis."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from common.errors import FleetError
from worker.engine.batch import Batch, BlockTables, GroupLimits
from worker.engine.loaded import LoadedModel
from worker.engine.memory import KvShape, allocate_kv_cache, free_memory_bytes, plan_kv_cache
from worker.engine.paged_runner import PagedRunner
from worker.engine.plan import (
    Chunk,
    KvCacheLayout,
    PromptLogprobs,
    Sampled,
    SequenceStart,
    StepPlan,
    StepResult,
)
from worker.layers.build import Build
from worker.layers.linear import local_kv_heads
from worker.models.config import ConfigError, ServedConfig, token_list
from worker.models.registry import model_class
from worker.parallel.group import Shard
from worker.sampling.sampler import Sampler
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder, find_model
from worker.weights.loader import load_weights
from worker.weights.tokenizer_files import read_tokenizer_files

log = logging.getLogger(__name__)


class TokenSampler(Protocol):
    """Chooses tokens from logits and remembers, per slot, what its rules need;
    `worker/sampling/sampler.py`."""

    def start(self, start: SequenceStart) -> None: ...

    def release(self, slot: int) -> None: ...

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> list[Sampled]: ...


class PagedEngine:
    """Block tables, sampling state and a model. Nothing it holds outlives a slot's sequence."""

    def __init__(
        self, layout: KvCacheLayout, runner: PagedRunner, tables: BlockTables, sampler: TokenSampler
    ) -> None:
        self.layout = layout
        self._runner = runner
        self._tables = tables
        self._sampler = sampler
        # Prompts whose log-probabilities were asked for, by slot.
        self._scored_prompts: dict[int, tuple[int, ...]] = {}

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Apply the plan's changes, run its chunks, choose the next tokens."""
        for slot in plan.released:
            self._release(slot)
        for start in plan.started:
            self._start(start)
        if not plan.chunks:
            return StepResult(plan.step, ())
        batch = self._tables.batch(plan.chunks)
        hidden = self._runner.hidden(batch)
        scored = self._score_prompts(plan.chunks, batch, hidden)
        sampled: tuple[Sampled, ...] = ()
        if batch.sampled_slots:
            logits = self._runner.sampled_logits(batch, hidden)
            sampled = tuple(
                self._sampler.sample(logits, batch.sampled_slots, batch.sampled_positions)
            )
        return StepResult(plan.step, sampled, scored)

    def _start(self, start: SequenceStart) -> None:
        self._tables.clear(start.slot)
        self._sampler.start(start)
        if start.prompt_logprobs:
            self._scored_prompts[start.slot] = start.prompt_tokens

    def _release(self, slot: int) -> None:
        self._tables.clear(slot)
        self._sampler.release(slot)
        self._scored_prompts.pop(slot, None)

    def _score_prompts(
        self, chunks: Sequence[Chunk], batch: Batch, hidden: torch.Tensor
    ) -> tuple[PromptLogprobs, ...]:
        """Row r of a chunk at `start` predicts the token at `start + r + 1`, which the next chunk
        may hold."""
        results = []
        for chunk, row in zip(chunks, batch.first_rows, strict=True):
            prompt = self._scored_prompts.get(chunk.slot, ())
            first = chunk.start + 1
            targets = prompt[first : first + len(chunk.tokens)]
            if targets:
                wanted = torch.tensor(targets, device=hidden.device)
                logprobs = self._runner.logprobs(hidden[row : row + len(targets)], wanted)
                results.append(PromptLogprobs(chunk.slot, first, tuple(logprobs.tolist())))
        return tuple(results)

    def close(self) -> None:
        """Let go of weights and cache."""
        self._runner = self._tables = self._sampler = None


def build_engine(settings: WorkerSettings, shard: Shard = Shard()) -> LoadedModel:
    """Find, load and size what `settings` names. Raises FleetError with one sentence."""
    try:
        return _build(settings, shard)
    except ValueError as error:
        raise FleetError(f"cannot serve {settings.model_id}: {error}") from error


def _build(settings: WorkerSettings, shard: Shard) -> LoadedModel:
    started_at = time.monotonic()
    folder = find_model(
        settings.model_id, revision=settings.revision, cache_dir=settings.huggingface_hub_cache
    )
    hf_config = folder.config()
    make_model = model_class(hf_config.get("architectures"))
    config = make_model.read_config(hf_config)
    max_total_tokens = _max_total_tokens(settings, config)
    device = _device(settings)
    build = Build(dtype=_dtype(settings, device), device=device, shard=shard)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)  # otherwise torch's own choice, one a core
    model = make_model(config, build).eval()
    load_weights(model, make_model.weight_names(config), folder.weight_files(), device)
    loaded_at = time.monotonic()
    shape = KvShape(
        config.num_layers,
        local_kv_heads(config.num_kv_heads, build)[0],
        config.head_dim,
        build.dtype,
    )
    layout = plan_kv_cache(
        shape,
        block_size=settings.block_size,
        num_slots=settings.max_batch_size,
        max_total_tokens=max_total_tokens,
        max_batch_total_tokens=settings.max_batch_total_tokens,
        memory_fraction=settings.memory_fraction,
        free_bytes=free_memory_bytes(device),
    )
    eos_tokens = _eos_tokens(folder, config)
    engine = PagedEngine(
        layout,
        PagedRunner(model, allocate_kv_cache(layout, shape, device)),
        BlockTables(
            layout,
            max_total_tokens=max_total_tokens,
            windows=config.windows,
            dtype=build.dtype,
            device=device,
            token_bytes=shape.token_bytes // shape.num_layers,
            limits=GroupLimits() if device.type == "cpu" else None,
        ),
        Sampler(layout.num_slots, config.vocab_size, eos_tokens=eos_tokens, device=device),
    )
    texts = read_tokenizer_files(folder)
    dtype_name = str(build.dtype).removeprefix("torch.")
    log.info(
        "loaded %s (%s, %s, %s) in %.1f s: %d tokens of KV cache, %d slots, up to %d tokens a sequence",
        *(settings.model_id, config.architecture, dtype_name, device, loaded_at - started_at),
        *(layout.num_tokens, layout.num_slots, max_total_tokens),
    )
    return LoadedModel(
        engine=engine,
        layout=layout,
        tokenizer_json=texts.tokenizer_json,
        architecture=config.architecture,
        served_by="engine",
        dtype=dtype_name,
        device=str(device),
        vocab_size=config.vocab_size,
        max_total_tokens=max_total_tokens,
        eos_tokens=eos_tokens,
        bos_token=texts.bos_token,
        eos_token=texts.eos_token,
        chat_template=texts.chat_template,
        revision=folder.revision,
    )


def _max_total_tokens(settings: WorkerSettings, config: ServedConfig) -> int:
    wanted = settings.max_total_tokens or config.max_positions
    if wanted > config.max_positions:
        raise ConfigError(
            f"`max_total_tokens` must be <= {config.max_positions}, what the model was made for. Given: {wanted}"
        )
    return wanted


def _device(settings: WorkerSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` is cuda, but torch finds no CUDA device; use cpu or auto")
    return torch.device(settings.device)


def _dtype(settings: WorkerSettings, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16, or float32 where the device has none; a float32 checkpoint is rounded, as
    said in --help."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if settings.dtype != "auto":
        return names[settings.dtype]
    has_bfloat16 = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _eos_tokens(folder: ModelFolder, config: ServedConfig) -> tuple[int, ...]:
    """generation_config.json knows more ends than config.json, for example a chat model's end of
    turn."""
    return (
        token_list(folder.json("generation_config.json").get("eos_token_id")) or config.eos_tokens
    )
