"""Pooling connector: fewer tokens by averaging neighbouring patches before an MLP."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.data.layout import Grid
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import mlp


def pooled_grid(grid: Grid, pool: int | None) -> Grid:
    """The token grid after `pool` x `pool` averaging; patches left over at the right and bottom form smaller cells."""
    if pool is None:
        return (1, 1)
    rows, columns = grid
    if rows < pool or columns < pool:
        raise ConfigError(f"connector.pool: {pool} x {pool} does not fit the patch grid {rows} x {columns}")
    return (-(-rows // pool), -(-columns // pool))


class PooledMLP(nn.Module):
    """`[N, P, in_dim]` -> `[N, Q, out_dim]`: average of `pool` x `pool` neighbours (null: of all patches), then an MLP.

    A grid that `pool` does not divide keeps its edge: the last row and column average the patches that are left
    (27 x 27 pooled by 2 gives 14 x 14 tokens). Features without a grid (a kept class token) are refused.
    """

    def __init__(self, *, in_dim: int, out_dim: int, pool: int | None = 2, depth: int = 2) -> None:
        super().__init__()
        if pool is not None and pool < 1:
            raise ConfigError(f"connector.pool: needs a positive factor, got {pool}")
        self.pool = pool
        self.token_grid = partial(pooled_grid, pool=pool)
        self.layers = mlp(in_dim, out_dim, depth)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """`grid` is the (rows, columns) arrangement of the P patches."""
        pooled_grid(grid, self.pool)
        image = features.transpose(1, 2).unflatten(2, grid)
        image = F.avg_pool2d(image, self.pool or grid, ceil_mode=True)
        return self.layers(image.flatten(2).transpose(1, 2))
