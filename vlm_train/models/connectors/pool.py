"""Pooling connector: fewer tokens by averaging neighbouring patches before an MLP."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3, map_grids
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import make_mlp


def pooled_grid(grid: Grid3, pool: int | None) -> Grid3:
    """The token grid after `pool` x `pool` averaging; patches left over at the right and bottom form smaller cells."""
    if pool is None:
        return Grid3(grid.t, 1, 1)
    if grid.h < pool or grid.w < pool:
        raise ConfigError(f"connector.pool: {pool} x {pool} does not fit the patch grid {grid.h} x {grid.w}")
    return Grid3(grid.t, -(-grid.h // pool), -(-grid.w // pool))


class PooledMLP(nn.Module):
    """Width in_dim -> out_dim: average of `pool` x `pool` neighbours (null: of all patches), then an MLP.

    A grid that `pool` does not divide keeps its edge: the last row and column average the patches that are left
    (27 x 27 pooled by 2 gives 14 x 14 tokens). Features without a grid (a kept class token) are refused.
    """

    def __init__(self, *, in_dim: int, out_dim: int, pool: int | None = 2, depth: int = 2) -> None:
        super().__init__()
        if pool is not None and pool < 1:
            raise ConfigError(f"connector.pool: needs a positive factor, got {pool}")
        self.pool = pool
        self.token_grid = partial(pooled_grid, pool=pool)
        self.layers = make_mlp(in_dim, out_dim, depth)

    def forward(self, features: Features) -> Features:
        """Patches are averaged grid by grid, and projected all at once."""
        return map_grids(features, self._average, self.token_grid).map(self.layers)

    def _average(self, values: Tensor, grid: Grid3) -> Tensor:
        """`[n, P, D]` -> `[n, Q, D]`; every time of the grid by itself."""
        image = values.unflatten(1, grid).flatten(0, 1).movedim(-1, 1)
        image = F.avg_pool2d(image, self.pool or (grid.h, grid.w), ceil_mode=True)
        return image.flatten(2).transpose(1, 2).unflatten(0, (-1, grid.t)).flatten(1, 2)
