"""What settings leave open ("auto"), decided: by the machine, the model's files, and the shards
that share a machine."""

import logging

import torch
from tokenizers import Tokenizer

from common.machine_limits import num_usable_cores
from worker.engine.memory import free_memory_bytes, longest_sequence
from worker.engine.plan import KvCacheLayout
from worker.kernels.cpu.library import cpu_library, processor
from worker.models.config import ConfigError, DecoderConfig, ServedConfig, token_list
from worker.parallel.group import Shard
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder
from worker.weights.tokenizer_files import TokenizerFiles

log = logging.getLogger(__name__)

# A model that cannot even take this much is of no use to whoever started it.
USEFUL_TOTAL_TOKENS = 256


def resolve_max_total_tokens(settings: WorkerSettings, config: ServedConfig) -> int:
    """What was asked for, or what the model was made for. Raises ConfigError if that is less."""
    longest = config.max_positions
    if isinstance(config, DecoderConfig):
        longest = max(longest, config.max_stretched_positions)
    wanted = settings.max_total_tokens or config.max_positions
    if wanted > longest:
        raise ConfigError(
            f"`max_total_tokens` must be <= {longest}, what the model was made for. Given: {wanted}"
        )
    return wanted


def resolve_min_total_tokens(settings: WorkerSettings, max_total_tokens: int) -> int:
    """How many tokens of a sequence the memory must hold for the worker to start: what was asked
    for, or where the length is left to us, enough to be of use."""
    if settings.max_total_tokens:
        return max_total_tokens
    needed = max(USEFUL_TOTAL_TOKENS, (settings.max_input_tokens or 0) + 1)
    return min(max_total_tokens, needed)


def resolve_fitting_tokens(
    max_total_tokens: int, layout: KvCacheLayout, *, tables_per_sequence: int = 1
) -> int:
    """`max_total_tokens`, or what the cache holds of one sequence if that is less; then the log
    says so. All shards agree, because they have the same layout."""
    fitting = longest_sequence(layout, tables_per_sequence=tables_per_sequence)
    if fitting >= max_total_tokens:
        return max_total_tokens
    log.warning(
        "a sequence may have %d tokens, not the model's %d: no more fits in the KV cache. "
        "--max-total-tokens sets a length, --memory-fraction the cache's share of the memory",
        *(fitting, max_total_tokens),
    )
    return fitting


def resolve_device(settings: WorkerSettings, shard: Shard) -> torch.device:
    """Where this shard runs. Raises ConfigError."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` is cuda, but torch finds no CUDA device; use cpu or auto")
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", shard.local_rank) if shard.size > 1 else torch.device("cuda")


def set_threads(settings: WorkerSettings, shard: Shard) -> None:
    """What was asked for, or torch's own choice, but no more than this shard's part of the cores
    that the process may use: torch knows the machine and not its control groups. Our kernels run on
    as many threads as torch."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
        return
    num_threads = max(1, num_usable_cores() // shard.local_size)
    if num_threads < torch.get_num_threads():
        torch.set_num_threads(num_threads)


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


def resolve_eos_tokens(
    folder: ModelFolder, config: ServedConfig, texts: TokenizerFiles
) -> tuple[int, ...]:
    """The tokens that end a text, in the order of the files that name them.

    generation_config.json knows more ends than config.json, for example a chat model's end of turn;
    of some fine-tunes only the tokenizer knows that.
    """
    named = token_list(folder.json("generation_config.json").get("eos_token_id"))
    tokens = list(named or config.eos_tokens)
    if texts.eos_token:
        token = Tokenizer.from_str(texts.tokenizer_json).token_to_id(texts.eos_token)
        tokens += [] if token is None else [token]
    known = [token for token in dict.fromkeys(tokens) if 0 <= token < config.vocab_size]
    if unknown := sorted(set(tokens).difference(known)):
        log.warning(
            "the model's files name ends of a text that are no tokens of its %d, and are left out: "
            "%s",
            *(config.vocab_size, ", ".join(map(str, unknown))),
        )
    return tuple(known)
