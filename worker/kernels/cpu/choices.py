"""The choice of tokens from logits, called with tensors, and what goes with it. None is what callers get where there is no
kernel: for another device, processor or type of number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.cpu.library import SUFFIXES, cpu_library, kernel_function

_ROOM_FOR_EQUALS = 64


@dataclass(frozen=True, slots=True)
class RandomChoice:
    """What was drawn for some rows of logits.

    Attributes:
        tokens: `[n]` int64.
        logprobs: `[n]` among the tokens that the rules keep; NaN where a logit is NaN or infinite, or
            no token may be chosen.
        log_totals: `[n]` logsumexp of `values`.
        values: `[n, V]` what the rules keep of the logits after the temperature, less the largest, and
            else -inf; None where nobody wanted them.
    """

    tokens: Tensor
    logprobs: Tensor
    log_totals: Tensor
    values: Tensor | None


def greedy_choice(logits: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of rows `[n, V]`: the largest logit's token, that logit and the row's logsumexp, each `[n]`. A
    logsumexp is NaN where a logit is NaN or infinite."""
    kernel = _kernel("greedy", "ppppiii", logits)
    if kernel is None:
        return None
    num_rows, size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    largest, totals = torch.empty(num_rows), torch.empty(num_rows)
    kernel(
        *(tokens.data_ptr(), largest.data_ptr(), totals.data_ptr(), logits.data_ptr()),
        *(num_rows, size, logits.stride(0), torch.get_num_threads()),
    )
    return tokens, largest, totals.log_().add_(largest)


def random_choice(
    logits: Tensor, rows: Tensor, rules: Tensor, keys: Tensor, *, has_values: bool
) -> RandomChoice | None:
    """Draw a token for some rows of `logits` `[T, V]`.

    Args:
        rows: which ones, `[n]` int64.
        rules: `[n, 5]` float32: temperature, top_k, top_p, typical_p, min_p, as in
            `worker/sampling/processors.py`.
        keys: of the noise, `[n, 2]` int32 (`row_keys`).
    """
    kernel = _kernel("random", "ppppppppiii", logits)
    if kernel is None:
        return None
    num_rows, size = len(rows), logits.shape[1]
    tokens = torch.empty(num_rows, dtype=torch.int64)
    logprobs, log_totals = torch.empty(num_rows), torch.empty(num_rows)
    values = torch.empty(num_rows, size) if has_values else None
    kernel(
        *(tokens.data_ptr(), logprobs.data_ptr(), log_totals.data_ptr()),
        None if values is None else values.data_ptr(),
        *(logits.data_ptr(), rows.data_ptr(), rules.data_ptr(), keys.data_ptr()),
        *(num_rows, size, logits.stride(0), torch.get_num_threads()),
    )
    return RandomChoice(tokens, logprobs, log_totals, values)


def keep_tokens_(logits: Tensor, rows: Tensor, bits: Tensor) -> bool:
    """Make -infinite what `bits` do not allow; False where there is no kernel. The rest as in
    `worker.sampling.processors.keep_grammatical_`."""
    kernel = _kernel("keep_tokens", "pppiiii", logits) if logits.dtype == torch.float32 else None
    if kernel is None:
        return False
    bits = bits.contiguous()
    kernel(
        *(logits.data_ptr(), rows.data_ptr(), bits.data_ptr()),
        *(len(rows), bits.shape[1], logits.shape[1], logits.stride(0)),
        torch.get_num_threads(),
    )
    return True


def likeliest_tokens(
    logits: Tensor, rows: Tensor, wanted: Tensor
) -> list[tuple[Tensor, Tensor]] | None:
    """Of some rows of `logits` `[T, V]`, ids and logits of the `wanted` largest, and of what equals
    the smallest of them; none that is -infinite, and in the order of their ids. Rows and wanted are
    `[n]` int64."""
    kernel = _kernel("top_tokens", "ppppppiiii", logits)
    if kernel is None:
        return None
    num_rows, size = len(rows), logits.shape[1]
    capacity = min(size, int(wanted.max()) + _ROOM_FOR_EQUALS)
    counts = torch.empty(num_rows, dtype=torch.int64)
    while True:
        ids = torch.empty(num_rows, capacity, dtype=torch.int32)
        found = torch.empty(num_rows, capacity)
        kernel(
            *(counts.data_ptr(), ids.data_ptr(), found.data_ptr(), logits.data_ptr()),
            *(rows.data_ptr(), wanted.data_ptr()),
            *(num_rows, size, logits.stride(0), capacity, torch.get_num_threads()),
        )
        most = int(counts.max())
        if most <= capacity:
            return [(ids[i, :count], found[i, :count]) for i, count in enumerate(counts.tolist())]
        capacity = most


def _kernel(name: str, arguments: str, logits: Tensor) -> Callable[..., None] | None:
    library = cpu_library() if logits.device.type == "cpu" else None
    if library is None or logits.dtype not in SUFFIXES or logits.stride(1) != 1:
        return None
    return kernel_function(library, f"{name}_{SUFFIXES[logits.dtype]}", arguments)
