"""Rows for new tokens as parameters of their own, so that they can learn while the base vocabulary stays frozen.

They replace the model's input embedding and output head, so that all users of the model (generation too) see them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExtendedEmbedding(nn.Module):
    """An embedding table with `count` more rows (`new_embeddings`), which start as the mean of the base rows."""

    def __init__(self, base: nn.Embedding, count: int) -> None:
        super().__init__()
        self.base = base
        self.new_embeddings = _mean_rows(base.weight, count)

    @property
    def weight(self) -> Tensor:
        """The base table `[V_base, D]`."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """`[...]` -> `[..., D]`."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        new = self.new_embeddings[(ids - size).clamp(min=0)]
        return torch.where((ids >= size)[..., None], new.to(known.dtype), known)


class ExtendedHead(nn.Module):
    """An output head with `count` more logits. `tied` shares the rows of the embedding; else they are `new_head`."""

    def __init__(self, base: nn.Linear, count: int, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.base = base
        self.new_head = tied if tied is not None else _mean_rows(base.weight, count)

    @property
    def weight(self) -> Tensor:
        """The base head `[V_base, D]`."""
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V_base + count]`."""
        return torch.cat([self.base(hidden), nn.functional.linear(hidden, self.new_head)], dim=-1)


def _mean_rows(table: Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(table.detach().mean(dim=0, keepdim=True).repeat(count, 1))
