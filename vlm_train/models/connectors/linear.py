"""Linear connector: one projection a patch (LLaVA v1)."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_train.data.layout import Grid
from vlm_train.models.connectors.mlp import same_grid


class Linear(nn.Module):
    """`[N, P, in_dim]` -> `[N, P, out_dim]`."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.token_grid = same_grid
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """`grid` is not used: patches are projected one by one."""
        return self.proj(features)
