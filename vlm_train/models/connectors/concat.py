"""Concatenation connector: neighbouring patches become one token of their width together (MiniGPT-4 with Llama-2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3, map_grids
from vlm_train.errors import ConfigError


def grouped_grid(grid: Grid3, patches: int) -> Grid3:
    """The token grid after `patches` neighbours of a row became one token."""
    if grid.h == 1 and grid.w > 1:
        raise ConfigError(f"connector.patches: features in a row of {grid.w} have no grid; set vision.keep_cls=false")
    return grid._replace(w=-(-grid.w // patches))


class ConcatLinear(nn.Module):
    """Width in_dim -> out_dim: `patches` neighbours of a row, left to right, then one linear layer.

    As MiniGPT-4's view of `[P, D]` as `[P / 4, 4 D]` where a row is a multiple of 4 (minigpt4/models/minigpt4.py);
    elsewhere the last token of a row ends in zeros. Features without a grid (a kept class token) are refused.
    """

    def __init__(self, *, in_dim: int, out_dim: int, patches: int = 4) -> None:
        super().__init__()
        if patches < 1:
            raise ConfigError(f"connector.patches: needs a positive number, got {patches}")
        self.patches = patches
        self.token_grid = partial(grouped_grid, patches=patches)
        self.proj = nn.Linear(in_dim * patches, out_dim)

    def forward(self, features: Features) -> Features:
        """Neighbours are joined grid by grid, and projected all at once."""
        return map_grids(features, self._join_neighbors, self.token_grid).map(self.proj)

    def _join_neighbors(self, values: Tensor, grid: Grid3) -> Tensor:
        """`[n, P, D]` -> `[n, Q, patches * D]`."""
        groups = self.token_grid(grid).w
        rows = values.unflatten(1, (grid.t * grid.h, grid.w))
        rows = F.pad(rows, (0, 0, 0, groups * self.patches - grid.w))
        return rows.unflatten(2, (groups, self.patches)).flatten(3).flatten(1, 2)
