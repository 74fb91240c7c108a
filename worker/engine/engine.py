"""Builds everything on a shard; then `step(plan)`, on the one engine thread. Knows no requests, no
text and no Redis."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from common.errors import FleetError
from common.machine_limits import has_spare_memory
from worker.engine.batch import Batch, BlockTables, GroupLimits
from worker.engine.loaded import Engine, LoadedModel
from worker.engine.memory import (
    KvShape,
    allocate_kv_cache,
    has_room_for_file_cache,
    plan_kv_cache,
)
from worker.engine.paged_runner import EncoderDecoderModel, PagedModel, PagedRunner
from worker.engine.plan import (
    Chunk,
    KvCacheLayout,
    PromptLogprobs,
    Sampled,
    SequenceStart,
    StepPlan,
    StepResult,
)
from worker.engine.resolve import (
    cache_budget_bytes,
    resolve_device,
    resolve_dtype,
    resolve_eos_tokens,
    resolve_fitting_tokens,
    resolve_max_total_tokens,
    resolve_min_total_tokens,
    set_threads,
    warn_of_slow_kernels,
)
from worker.layers.build import Build
from worker.layers.linear import local_kv_heads
from worker.models.config import ServedConfig
from worker.models.registry import has_family, model_class
from worker.models.text_style import with_text_style
from worker.parallel.group import Shard
from worker.quantization.registry import linear_backends
from worker.sampling.grammar import Grammars
from worker.sampling.sampler import Sampler
from worker.sampling.watermark import Watermark
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder
from worker.weights.loader import load_weights
from worker.weights.prepare import prepare_model
from worker.weights.progress import in_log
from worker.weights.tokenizer_files import TokenizerFiles, read_tokenizer_files

log = logging.getLogger(__name__)


class TokenSampler(Protocol):
    """Chooses tokens from logits and remembers, per slot, what its rules need;
    `worker/sampling/sampler.py`."""

    def start(self, start: SequenceStart) -> None: ...

    def release(self, slot: int) -> None: ...

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> list[Sampled]: ...


class Bystander:
    """The sampler of shards above zero: rank 0 alone chooses, and its next plan tells them what."""

    def start(self, start: SequenceStart) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> list[Sampled]:
        """Nothing; the logits had to be computed, because gathering them takes all shards."""
        return []


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
        encoder_batch = self._tables.encoder_batch(plan.started)
        if encoder_batch is not None:
            self._runner.encode(encoder_batch)
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
        self._tables.start(start)
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
    folder = prepare_model(
        settings.model_id, revision=settings.revision, cache_dir=settings.huggingface_hub_cache
    )
    hf_config = folder.config()
    device = resolve_device(settings, shard)
    linear_backend, head_backend = linear_backends(settings.quantize)
    build = Build(
        dtype=resolve_dtype(settings, device),
        device=device,
        shard=shard,
        linear_backend=linear_backend,
        head_backend=head_backend,
    )
    set_threads(settings, shard)
    warn_of_slow_kernels(device)
    if not has_family(hf_config.get("architectures")):
        # Importing transformers takes seconds; our own families do without.
        from worker.engine.fallback import build_fallback

        return build_fallback(settings, folder, build)
    make_model = model_class(hf_config.get("architectures"))
    config = make_model.read_config(hf_config)
    resolve_max_total_tokens(settings, config)  # refuses before anything is loaded
    model = make_model(config, build).eval()
    files = folder.weight_files()
    load_weights(
        model,
        make_model.weight_names(config),
        files,
        device,
        progress=in_log(log) if shard.rank == 0 else None,
        drops_cache=not has_room_for_file_cache(files),
    )
    return serve_paged(settings, folder, build, config, model, served_by="engine")


def serve_paged(
    settings: WorkerSettings,
    folder: ModelFolder,
    build: Build,
    config: ServedConfig,
    model: PagedModel,
    *,
    served_by: str,
) -> LoadedModel:
    """A model with its weights, on as much paged cache as fits."""
    max_total_tokens = resolve_max_total_tokens(settings, config)
    is_encoder_decoder = isinstance(model, EncoderDecoderModel)
    num_tables = 2 if is_encoder_decoder else 1
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
        min_total_tokens=resolve_min_total_tokens(settings, max_total_tokens),
        tables_per_sequence=num_tables,
        max_batch_total_tokens=settings.max_batch_total_tokens,
        memory_fraction=settings.memory_fraction,
        free_bytes=cache_budget_bytes(build.device, build.shard),
    )
    max_total_tokens = resolve_fitting_tokens(
        max_total_tokens, layout, tables_per_sequence=num_tables
    )
    texts = with_text_style(read_tokenizer_files(folder), config)
    eos_tokens = resolve_eos_tokens(folder, config, texts)
    engine = PagedEngine(
        layout,
        PagedRunner(model, allocate_kv_cache(layout, shape, build.device)),
        BlockTables(
            layout,
            max_total_tokens=max_total_tokens,
            windows=config.windows,
            dtype=build.dtype,
            device=build.device,
            token_bytes=shape.token_bytes // shape.num_layers,
            limits=GroupLimits() if build.device.type == "cpu" else None,
        ),
        Bystander()
        if build.shard.rank > 0
        else make_sampler(
            settings, build, config, texts, eos_tokens=eos_tokens, num_slots=layout.num_slots
        ),
    )
    return describe(
        settings,
        folder,
        build,
        config,
        texts,
        engine=engine,
        served_by=served_by,
        max_total_tokens=max_total_tokens,
        eos_tokens=eos_tokens,
        decoder_start_token=model.decoder_start_token if is_encoder_decoder else None,
        # Pages of a CPU's cache are the machine's until something is written there.
        has_spare_memory=has_spare_memory if build.device.type == "cpu" else lambda: True,
    )


def make_sampler(
    settings: WorkerSettings,
    build: Build,
    config: ServedConfig,
    texts: TokenizerFiles,
    *,
    eos_tokens: tuple[int, ...],
    num_slots: int,
) -> Sampler:
    """The sampler of the shard that chooses."""
    return Sampler(
        num_slots,
        config.vocab_size,
        eos_tokens=eos_tokens,
        device=build.device,
        grammars=Grammars(texts.tokenizer_json, eos_tokens=eos_tokens),
        watermark=Watermark(
            config.vocab_size, gamma=settings.watermark_gamma, delta=settings.watermark_delta
        ),
    )


def describe(
    settings: WorkerSettings,
    folder: ModelFolder,
    build: Build,
    config: ServedConfig,
    texts: TokenizerFiles,
    *,
    engine: Engine,
    served_by: str,
    max_total_tokens: int,
    eos_tokens: tuple[int, ...],
    decoder_start_token: int | None,
    has_paged_cache: bool = True,
    has_spare_memory: Callable[[], bool] = lambda: True,
) -> LoadedModel:
    """An engine with the facts of its model; one line of the log."""
    layout = engine.layout
    dtype_name = str(build.dtype).removeprefix("torch.")
    log.info(
        "loaded %s (%s, %s, %s): %d tokens of KV cache, %d slots, up to %d tokens a sequence",
        *(settings.model_id, config.architecture, dtype_name, build.device),
        *(layout.num_tokens, layout.num_slots, max_total_tokens),
    )
    return LoadedModel(
        engine=engine,
        layout=layout,
        tokenizer_json=texts.tokenizer_json,
        prompt_style=texts.prompt_style,
        keeps_special_tokens=texts.keeps_special_tokens,
        architecture=config.architecture,
        served_by=served_by,
        dtype=dtype_name,
        device=str(build.device),
        vocab_size=config.vocab_size,
        max_total_tokens=max_total_tokens,
        eos_tokens=eos_tokens,
        bos_token=texts.bos_token,
        eos_token=texts.eos_token,
        chat_template=texts.chat_template,
        quantization=settings.quantize or "",
        revision=folder.revision,
        decoder_start_token=decoder_start_token,
        has_paged_cache=has_paged_cache,
        has_spare_memory=has_spare_memory,
    )
