"""Pooling connector: fewer tokens by averaging neighbouring patches before an MLP, or behind it."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3, map_grids
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import make_mlp
from vlm_train.models.weights.connector_names import LLAVA, load_connector


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

    Args:
        depth: linear layers of the MLP, with exact GELU between them.
        project_first: the MLP, then the average, as in PerceptionLM.
        weights: the PerceptionLM that it is taken from, a hub name or a local folder.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        pool: int | None = 2,
        depth: int = 2,
        project_first: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if pool is not None and pool < 1:
            raise ConfigError(f"connector.pool: needs a positive factor, got {pool}")
        self.pool, self.project_first, self.weights = pool, project_first, weights
        self.token_grid = partial(pooled_grid, pool=pool)
        self.layers = make_mlp(in_dim, out_dim, depth)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they hold no MLP of this depth and width."""
        if self.weights is not None:
            load_connector(self, self.weights, (LLAVA,))

    def forward(self, features: Features) -> Features:
        """Patches are averaged grid by grid, and projected all at once."""
        if self.project_first:
            return map_grids(features.map(self.layers), self._average, self.token_grid)
        return map_grids(features, self._average, self.token_grid).map(self.layers)

    def _average(self, values: Tensor, grid: Grid3) -> Tensor:
        """`[n, P, D]` -> `[n, Q, D]`; every time of the grid by itself."""
        image = values.unflatten(1, grid).flatten(0, 1).movedim(-1, 1)
        image = F.avg_pool2d(image, self.pool or (grid.h, grid.w), ceil_mode=True)
        return image.flatten(2).transpose(1, 2).unflatten(0, (-1, grid.t)).flatten(1, 2)
