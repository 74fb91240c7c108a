"""Single entries of a batch of logits, collected on the host, for one rule at a time."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Entries:
    """The entries of the logits that a rule changes."""

    rows: list[Tensor] = field(default_factory=list)
    columns: list[tuple[Tensor, ...]] = field(default_factory=list)

    def add(self, row: int, tokens: Tensor, *more: Tensor | float) -> None:
        """Add `tokens` `[n]` of a row, with further values: tensors `[n]`, or a number for all."""
        self.rows.append(torch.full((len(tokens),), row))
        values = (v if isinstance(v, Tensor) else torch.full((len(tokens),), v) for v in more)
        self.columns.append((tokens, *values))

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Rows, tokens and the further values, `[entries]` each."""
        parts = (self.rows, *zip(*self.columns, strict=True))
        return [torch.cat(part).to(device, non_blocking=True) for part in parts]
