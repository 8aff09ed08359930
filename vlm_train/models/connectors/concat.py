"""Concatenation connector: neighbouring patches become one token of their width together (MiniGPT-4 with Llama-2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.data.layout import Grid
from vlm_train.errors import ConfigError


def grouped_grid(grid: Grid, patches: int) -> Grid:
    """The token grid after `patches` neighbours of a row became one token."""
    rows, columns = grid
    if rows == 1 and columns > 1:
        raise ConfigError(f"connector.patches: features in a row of {columns} have no grid; set vision.keep_cls=false")
    return (rows, -(-columns // patches))


class ConcatLinear(nn.Module):
    """`[N, P, in_dim]` -> `[N, Q, out_dim]`: `patches` neighbours of a row, left to right, then one linear layer.

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

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """`grid` is the (rows, columns) arrangement of the P patches."""
        _, groups = grouped_grid(grid, self.patches)
        image = features.unflatten(1, grid)
        image = F.pad(image, (0, 0, 0, groups * self.patches - grid[1]))
        return self.proj(image.unflatten(2, (groups, self.patches)).flatten(3).flatten(1, 2))
