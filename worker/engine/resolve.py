"""What settings leave open ("auto"), decided: by the machine, the model's files, and the shards
that share a machine."""

import logging
import os

import torch

from worker.engine.memory import free_memory_bytes
from worker.kernels.cpu.library import cpu_library, processor
from worker.models.config import ConfigError, ServedConfig, token_list
from worker.parallel.group import Shard
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder

log = logging.getLogger(__name__)


def resolve_max_total_tokens(settings: WorkerSettings, config: ServedConfig) -> int:
    """What was asked for, or what the model was made for. Raises ConfigError if that is less."""
    wanted = settings.max_total_tokens or config.max_positions
    if wanted > config.max_positions:
        raise ConfigError(
            f"`max_total_tokens` must be <= {config.max_positions}, what the model was made for. "
            f"Given: {wanted}"
        )
    return wanted


def resolve_device(settings: WorkerSettings, shard: Shard) -> torch.device:
    """Where this shard runs. Raises ConfigError."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` is cuda, but torch finds no CUDA device; use cpu or auto")
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", shard.local_rank) if shard.size > 1 else torch.device("cuda")


def set_threads(settings: WorkerSettings, shard: Shard) -> None:
    """Alone, torch's own choice is right: one a core. Shards of a machine share them."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    elif shard.size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // shard.local_size))


def warn_of_slow_kernels(device: torch.device) -> None:
    """Say so if this CPU has to do with torch's operations."""
    if device.type == "cpu" and cpu_library() is None:
        log.warning(
            "no kernels were compiled for this kind of processor (%s): torch's operations take "
            "their place, and take about twice as long",
            processor(),
        )


def cache_budget_bytes(device: torch.device, shard: Shard) -> int:
    """What this shard may take for its cache: the same on all of them, so that all have the same
    blocks. Measured once the weights of all are in memory."""
    shard.minimum(0)
    free_bytes = free_memory_bytes(device)
    if device.type == "cpu":
        free_bytes //= shard.local_size  # one memory for all
    return shard.minimum(free_bytes)


def resolve_dtype(settings: WorkerSettings, device: torch.device) -> torch.dtype:
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


def resolve_eos_tokens(folder: ModelFolder, config: ServedConfig) -> tuple[int, ...]:
    """generation_config.json knows more ends than config.json, for example a chat model's end of
    turn."""
    return (
        token_list(folder.json("generation_config.json").get("eos_token_id")) or config.eos_tokens
    )
