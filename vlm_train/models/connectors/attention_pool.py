"""Attention pooling connector: the mean of neighboring patches asks them for one token, then a gated MLP (Molmo2).

Legend: Q tokens of all views, K patches of a token, D_v / D / D_t widths of features, attention and language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.pool import pooled_grid


class AttentionPool(nn.Module):
    """Width in_dim -> out_dim: `pool` x `pool` neighbors become one token by attention, whose query is their mean.

    A grid that `pool` does not divide has smaller cells at its borders. As `Molmo2Adapter` of `transformers`
    (olmo/nn/vision_backbone.py of github.com/allenai/molmo2, `attention_meanq`), whose result is added to the embedding
    of an image token: here `offset`, which every token has in common.

    Args:
        in_dim, out_dim: D_v and D_t; given by `build.py`.
        hidden_size: D.
        num_heads: of the attention; they divide D.
        intermediate_size: width inside the MLP.
        pool: side of the square of patches that becomes a token.
        frame_pool: the same of the frames of a video, where a family tells them apart.
        init_std: weights start as normal numbers of this deviation.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        hidden_size: int = 1152,
        num_heads: int = 16,
        intermediate_size: int = 9728,
        pool: int = 2,
        frame_pool: int = 3,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if min(pool, frame_pool) < 1:
            raise ConfigError(f"connector: pool {pool}, frame_pool {frame_pool}; allowed: at least 1 each")
        if num_heads < 1 or hidden_size % num_heads:
            raise ConfigError(f"connector.num_heads: {num_heads}; allowed: a divisor of hidden_size {hidden_size}")
        self.pool, self.frame_pool, self.num_heads = pool, frame_pool, num_heads
        self.token_grid, self.frame_grid = partial(pooled_grid, pool=pool), partial(pooled_grid, pool=frame_pool)
        self.query, self.key, self.value = (nn.Linear(in_dim, hidden_size) for _ in range(3))
        self.output = nn.Linear(hidden_size, hidden_size)
        self.gate, self.up = (nn.Linear(hidden_size, intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate_size, out_dim, bias=False)
        self.offset = nn.Parameter(torch.zeros(out_dim))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=init_std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.offset, std=init_std)

    def forward(self, features: Features, frames: Sequence[bool] | None = None) -> Features:
        """Cells are found grid by grid, and pooled and projected all at once.

        `frames`: which views are frames of a video; None: none.
        """
        pools = [self.frame_pool if frame else self.pool for frame in frames or [False] * len(features.grids)]
        index = torch.from_numpy(_find_cells(features.grids, pools)).to(features.values.device, non_blocking=True)
        shown = index >= 0
        patches = features.values[index.clamp(min=0)] * shown[..., None].to(features.values.dtype)  # [Q, K, D_v]
        query = patches.sum(dim=1, keepdim=True) / shown.sum(dim=1)[:, None, None].to(patches.dtype)
        tokens = self._attend(query, patches, shown)
        values = self.down(F.silu(self.gate(tokens)) * self.up(tokens)) + self.offset
        return Features(values, tuple(pooled_grid(grid, pool) for grid, pool in zip(features.grids, pools)))

    def _attend(self, query: Tensor, patches: Tensor, shown: Tensor) -> Tensor:
        """`[Q, 1, D_v]` reads `[Q, K, D_v]` where `shown` -> `[Q, D]`."""
        heads = (self.num_heads, -1)
        q = self.query(query).unflatten(-1, heads)  # [Q, 1, heads, C]
        k, v = (layer(patches).unflatten(-1, heads) for layer in (self.key, self.value))  # [Q, K, heads, C]
        # Written out: attention kernels are made for long rows, and take no more than 65,535 of them.
        scores = (q * k).sum(dim=-1) * q.shape[-1] ** -0.5
        shares = scores.masked_fill(~shown[..., None], float("-inf")).softmax(dim=1, dtype=torch.float32)
        return self.output((shares.to(v.dtype)[..., None] * v).sum(dim=1).flatten(1))


def _find_cells(grids: Sequence[Grid3], pools: Sequence[int]) -> np.ndarray:
    """The patches of every token of all views, one view after the other, `[Q, K]`; -1: none."""
    most, first, found = max(pools) ** 2, 0, []
    for grid, pool in zip(grids, pools, strict=True):
        cells = find_view_cells(grid, pool)
        cells = np.pad(cells, ((0, 0), (0, most - cells.shape[1])), constant_values=-1)
        found.append(np.where(cells < 0, -1, cells + first))
        first += grid.size
    return np.concatenate(found)


@lru_cache(maxsize=1024)
def find_view_cells(grid: Grid3, pool: int) -> np.ndarray:
    """The patches of every token of a view, `[Q, pool * pool]` int64, row by row; -1: beyond the border. Half of what
    is missing lies before the first row and column, rounded down."""
    rows, columns = -(-grid.h // pool), -(-grid.w // pool)
    top, left = (rows * pool - grid.h) // 2, (columns * pool - grid.w) // 2
    padded = np.full((grid.t, rows * pool, columns * pool), -1, np.int64)
    padded[:, top : top + grid.h, left : left + grid.w] = np.arange(grid.size).reshape(grid)
    cells = padded.reshape(grid.t, rows, pool, columns, pool).swapaxes(2, 3)
    return cells.reshape(-1, pool * pool)
