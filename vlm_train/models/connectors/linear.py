"""Linear connector: one projection a patch (LLaVA v1)."""

from __future__ import annotations

from torch import nn

from vlm_train.contracts.media import Features
from vlm_train.models.connectors.grids import same_grid


class Linear(nn.Module):
    """Width in_dim -> out_dim; one token a patch."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.token_grid = same_grid
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, features: Features) -> Features:
        """Patches are projected one by one."""
        return features.map(self.proj)
