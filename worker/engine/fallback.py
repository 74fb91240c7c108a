"""Serves what no family of ours computes, through transformers: on our paged cache where the model
allows it and proves it, with the model's own cache otherwise. Says which, and why."""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from worker.engine.engine import describe, make_sampler, serve_paged
from worker.engine.loaded import LoadedModel
from worker.engine.memory import StateShape, plan_kv_cache
from worker.engine.padded_engine import ForcedTokens, PaddedEngine
from worker.engine.padded_runner import PaddedRunner
from worker.engine.resolve import (
    cache_budget_bytes,
    resolve_eos_tokens,
    resolve_fitting_tokens,
    resolve_max_total_tokens,
    resolve_min_total_tokens,
)
from worker.engine.self_check import check_batched, check_cached, check_paged, check_tokens
from worker.layers.build import Build
from worker.models.auto import (
    AutoFacts,
    UnsupportedModelError,
    load_auto,
    model_errors,
    read_facts,
    text_config,
)
from worker.models.auto_paged import AutoPagedModel, longrope_switch, with_paged_cache
from worker.models.config import ConfigError
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder
from worker.weights.tokenizer_files import read_tokenizer_files

log = logging.getLogger(__name__)


def build_fallback(settings: WorkerSettings, folder: ModelFolder, build: Build) -> LoadedModel:
    """Load a model with transformers and choose its path. Raises ConfigError."""
    _check_settings(settings, build)
    model = load_auto(
        folder,
        dtype=build.dtype,
        device=build.device,
        trust_remote_code=settings.trust_remote_code,
    )
    name = type(model).__name__
    try:
        paged, facts = _paged_model(settings, model, build)
    except UnsupportedModelError as reason:
        log.warning(
            "%s is served by transformers with its own cache: our engine has no code for it, and "
            "it cannot use our paged cache because %s",
            *(name, reason),
        )
        return _serve_padded(settings, model, folder, build)
    log.warning(
        "%s is served by transformers on our paged cache: our engine has no code for it", name
    )
    return serve_paged(settings, folder, build, facts, paged, served_by="transformers")


def _check_settings(settings: WorkerSettings, build: Build) -> None:
    if settings.quantize is not None:
        raise ConfigError(
            "`quantize` must be left out for a model that transformers runs: only families of our "
            f"own engine can be quantized. Given: {settings.quantize}"
        )
    if build.shard.size > 1:
        raise ConfigError(
            "`num_shard` must be 1 for a model that transformers runs: only families of our own "
            f"engine can be sharded. Given: {build.shard.size}"
        )
    if build.linear_backend is not None:
        raise ConfigError(
            "`quantize` must be absent for a model that transformers runs: only families of our "
            "own engine can be quantized"
        )


def _paged_model(
    settings: WorkerSettings, model: PreTrainedModel, build: Build
) -> tuple[AutoPagedModel, AutoFacts]:
    """The model on our cache, proved right. Raises UnsupportedModelError, and leaves it as it was."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder model")
    own_attention = model.config._attn_implementation
    runner = PaddedRunner(model)
    with torch.inference_mode(), model_errors("without a cache"):
        expected = [runner.whole_logits(tokens) for tokens in _prompts(model)]
    facts = read_facts(model, vocab_size=expected[0].shape[-1])
    max_total_tokens = _max_total_tokens(settings, facts)
    try:
        facts = with_paged_cache(facts, model, max_total_tokens=max_total_tokens)
        paged = AutoPagedModel(model)
        check_paged(paged, _prompts(model), facts, build, expected)
    except UnsupportedModelError:
        if model.config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention)
        raise
    return paged, facts


def _serve_padded(
    settings: WorkerSettings, model: PreTrainedModel, folder: ModelFolder, build: Build
) -> LoadedModel:
    """The model with its own cache. Raises ConfigError if not even that computes what it should."""
    runner = PaddedRunner(model, recompute_after=longrope_switch(text_config(model)))
    prompt = _prompts(model)[0]
    encoder_tokens = prompt[::-1] if model.config.is_encoder_decoder else ()
    try:
        vocab_size = check_cached(runner, prompt, encoder_tokens, build.dtype)
    except UnsupportedModelError as error:
        raise ConfigError(f"transformers cannot decode {type(model).__name__}: {error}") from error
    _allow_batches(runner, model, build)
    facts = read_facts(model, vocab_size=vocab_size)
    max_total_tokens = _max_total_tokens(settings, facts)
    fixed_bytes, token_bytes = _state_bytes(runner, prompt, is_encoder_decoder=bool(encoder_tokens))
    if runner.is_batching:
        token_bytes *= 2  # a batch is a copy
    num_tables = 2 if encoder_tokens else 1
    layout = plan_kv_cache(
        StateShape(token_bytes),
        block_size=settings.block_size,
        num_slots=settings.max_batch_size,
        max_total_tokens=max_total_tokens,
        min_total_tokens=resolve_min_total_tokens(settings, max_total_tokens),
        tables_per_sequence=num_tables,
        max_batch_total_tokens=settings.max_batch_total_tokens,
        memory_fraction=settings.memory_fraction,
        free_bytes=cache_budget_bytes(build.device, build.shard)
        - fixed_bytes * settings.max_batch_size,
    )
    max_total_tokens = resolve_fitting_tokens(
        max_total_tokens, layout, tables_per_sequence=num_tables
    )
    texts = read_tokenizer_files(folder)
    eos_tokens = resolve_eos_tokens(folder, facts, texts)
    sampler = make_sampler(
        settings, build, facts, texts, eos_tokens=eos_tokens, num_slots=layout.num_slots
    )
    forced = ForcedTokens(facts.forced_first_token, facts.suppressed_tokens)
    return describe(
        settings,
        folder,
        build,
        facts,
        texts,
        engine=PaddedEngine(layout, runner, sampler, forced),
        served_by="transformers-padded",
        max_total_tokens=max_total_tokens,
        eos_tokens=eos_tokens,
        decoder_start_token=facts.decoder_start_token,
        has_paged_cache=False,
    )


def _allow_batches(runner: PaddedRunner, model: PreTrainedModel, build: Build) -> None:
    """Let sequences decode together if that is proved right."""
    try:
        if model.config.is_encoder_decoder:
            raise UnsupportedModelError("it is an encoder-decoder model")
        check_batched(runner, _prompts(model), build.dtype)
        runner.is_batching = True
    except UnsupportedModelError as reason:
        log.warning(
            "%s runs each sequence alone, so a step takes longer with each: %s",
            *(type(model).__name__, reason),
        )


def _prompts(model: PreTrainedModel) -> tuple[list[int], ...]:
    return check_tokens(text_config(model).vocab_size)


def _max_total_tokens(settings: WorkerSettings, facts: AutoFacts) -> int:
    if facts.max_positions:
        return resolve_max_total_tokens(settings, facts)
    if not settings.max_total_tokens:
        raise ConfigError(
            f"{facts.architecture} names no longest sequence: say how long one may be, "
            "with --max-total-tokens"
        )
    return settings.max_total_tokens


@torch.inference_mode()
def _state_bytes(
    runner: PaddedRunner, prompt: Sequence[int], *, is_encoder_decoder: bool
) -> tuple[int, int]:
    """What a sequence's cache takes: bytes at any length, and bytes for each further token, of
    encoder or decoder, whichever takes more. Measured."""

    def measure(num_tokens: int, num_encoder_tokens: int) -> int:
        runner.start(0, prompt[:num_encoder_tokens] if is_encoder_decoder else ())
        runner.run(0, prompt[:num_tokens])
        num_bytes = runner.state_bytes(0)
        runner.release(0)
        return num_bytes

    short = measure(4, 4)
    per_token = (measure(8, 4) - short) // 4
    per_encoder_token = (measure(4, 8) - short) // 4
    fixed_bytes = max(0, short - 4 * (per_token + per_encoder_token))
    return fixed_bytes, max(1, per_token, per_encoder_token)
