"""The likeliest tokens of a row, as clients may ask for them beside the chosen one."""

from collections.abc import Sequence

from torch import Tensor, tensor


def top_tokens(
    values: Tensor, log_total: Tensor, num_top: Sequence[int], ids: Tensor | None = None
) -> list[tuple[tuple[int, float], ...]]:
    """For each row its `num_top` likeliest tokens with log-probabilities, likeliest first.

    Then by token.

    As in TGI, tokens that are as likely as the last one come too. Dropped tokens never do.
    """
    wanted = [row for row, count in enumerate(num_top) if count > 0]
    tops: list[list[tuple[int, float]]] = [[] for _ in num_top]
    if wanted:
        index = tensor(wanted, device=values.device)
        counts = tensor([num_top[row] for row in wanted], device=values.device)
        counts = counts.clamp(max=values.shape[-1])
        logprobs = values[index].float() - log_total[index].unsqueeze(-1)
        likeliest = logprobs.topk(int(counts.max()), dim=-1).values
        threshold = likeliest.gather(-1, counts.unsqueeze(-1) - 1)
        rows, columns = ((logprobs >= threshold) & logprobs.isfinite()).nonzero(as_tuple=True)
        found = logprobs[rows, columns].tolist()
        tokens = columns if ids is None else ids[index][rows, columns]
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), found, strict=True):
            tops[wanted[row]].append((token, logprob))
    return [tuple(sorted(top, key=lambda entry: (-entry[1], entry[0]))) for top in tops]
