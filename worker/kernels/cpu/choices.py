"""The choice of tokens from logits, called with tensors. None is what callers get where there is no
kernel: for another device, processor or type of number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.cpu.library import SUFFIXES, cpu_library, kernel_function


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
    library = cpu_library() if logits.device.type == "cpu" else None
    if library is None or logits.dtype not in SUFFIXES or logits.stride(1) != 1:
        return None
    num_rows, size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    largest, totals = torch.empty(num_rows), torch.empty(num_rows)
    kernel_function(library, f"greedy_{SUFFIXES[logits.dtype]}", "ppppiii")(
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
    library = cpu_library() if logits.device.type == "cpu" else None
    if library is None or logits.dtype not in SUFFIXES or logits.stride(1) != 1:
        return None
    num_rows, size = len(rows), logits.shape[1]
    tokens = torch.empty(num_rows, dtype=torch.int64)
    logprobs, log_totals = torch.empty(num_rows), torch.empty(num_rows)
    values = torch.empty(num_rows, size) if has_values else None
    kernel_function(library, f"random_{SUFFIXES[logits.dtype]}", "ppppppppiii")(
        *(tokens.data_ptr(), logprobs.data_ptr(), log_totals.data_ptr()),
        None if values is None else values.data_ptr(),
        *(logits.data_ptr(), rows.data_ptr(), rules.data_ptr(), keys.data_ptr()),
        *(num_rows, size, logits.stride(0), torch.get_num_threads()),
    )
    return RandomChoice(tokens, logprobs, log_totals, values)
