"""The likeliest tokens of a row, as clients may ask for them beside the chosen one."""

from collections.abc import Sequence

from torch import Tensor, tensor

from worker.kernels.cpu.choices import likeliest_tokens


def top_tokens(
    values: Tensor, log_total: Tensor, num_top: Sequence[int], ids: Tensor | None = None
) -> list[tuple[tuple[int, float], ...]]:
    """For each row its `num_top` likeliest tokens with log-probabilities, likeliest first.

    Then by token.

    As in TGI, tokens that are as likely as the last one come too. Dropped tokens never do.
    """
    wanted = [row for row, count in enumerate(num_top) if count > 0]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(num_top)
    if wanted:
        rows, counts = tensor(wanted), tensor([num_top[row] for row in wanted])
        found = likeliest_tokens(values, rows, counts) if ids is None else None
        if found is None:
            found = likeliest_by_torch(values, rows, counts, ids)
        log_total = log_total.cpu()
        for row, (tokens, logits) in zip(wanted, found, strict=True):
            logprobs = (logits - log_total[row]).tolist()
            top = zip(tokens.tolist(), logprobs, strict=True)
            tops[row] = tuple(sorted(top, key=lambda entry: (-entry[1], entry[0])))
    return tops


def likeliest_by_torch(
    values: Tensor, rows: Tensor, wanted: Tensor, ids: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """What `likeliest_tokens` gives, on any device, and of values whose tokens are `ids`."""
    rows, wanted = rows.to(values.device), wanted.to(values.device)
    chosen = values[rows].float()
    wanted = wanted.clamp(max=values.shape[-1])
    likeliest = chosen.topk(int(wanted.max()), dim=-1).values
    threshold = likeliest.gather(-1, wanted.unsqueeze(-1) - 1)
    is_top = (chosen >= threshold) & chosen.isfinite()
    at, columns = is_top.nonzero(as_tuple=True)
    tokens = columns if ids is None else ids[rows[at], columns]
    counts = is_top.sum(dim=-1).tolist()
    return list(
        zip(tokens.cpu().split(counts), chosen[at, columns].cpu().split(counts), strict=True)
    )
