"""Learned 2-D positions of an image's tiles, added to their tokens ("GPT-4V style" tiling).

Legend: R, C rows and columns of tiles, N views, F features of all views, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_train.contracts.media import Features, Grid3, MediaInput, MediaShape
from vlm_train.errors import ConfigError


class TilePositions(nn.Module):
    """The tokens of the view of all of an image as they are; then those of its tiles, row by row, each with the learned
    vector of the tile's row and that of its column added. Images without tiles, and videos, get none.

    Args:
        out_dim: D; given by `build.py`.
        max_side: most rows, and most columns, of tiles.
        init_std: deviation of the vectors at the start.
    """

    def __init__(self, *, out_dim: int, max_side: int = 4, init_std: float = 0.02) -> None:
        super().__init__()
        if max_side < 1:
            raise ConfigError(f"parts.stitcher.max_side: got {max_side}; allowed: at least 1")
        self.count_tokens = count_tokens
        self.rows = nn.Parameter(torch.randn(max_side, out_dim) * init_std)
        self.columns = nn.Parameter(torch.randn(max_side, out_dim) * init_std)

    def forward(self, features: Features, media: MediaInput) -> Features:
        """`[F, D]` of all views -> the same, of all media items, see `Stitcher`.

        Raises:
            ConfigError: an image has more rows or columns of tiles than there are vectors.
        """
        places, grids, first = list[int](), list[Grid3](), 0
        for shape, count in zip(media.shapes, media.view_counts, strict=True):
            places += self._place_views(shape, count)
            grids.append(Grid3(1, 1, count_tokens(shape, features.grids[first : first + count])))
            first += count
        places += [0] * (len(features.grids) - first)  # of no item
        lengths = torch.tensor(features.lengths, device="cpu")
        index = torch.tensor(places, device="cpu").repeat_interleave(lengths).to(features.values.device)
        blank = tuple(Grid3(1, 1, grid.size) for grid in features.grids[first:])
        return Features(features.values + self._make_table(features.values)[index], (*grids, *blank))

    def _make_table(self, values: Tensor) -> Tensor:
        """`[1 + R * C, D]`: nothing, then the position of every tile. All of it takes part on every rank."""
        sums = (self.rows[:, None] + self.columns).flatten(0, 1)
        return torch.cat([torch.zeros_like(sums[:1]), sums]).to(values.dtype)

    def _place_views(self, shape: MediaShape, count: int) -> list[int]:
        """The row of the table for each view of an item."""
        most = len(self.rows)
        if max(shape.rows, shape.columns) > most:
            raise ConfigError(
                f"parts.stitcher.max_side: an image has {shape.rows} x {shape.columns} tiles; allowed: at most {most} "
                "rows and columns. Raise it, or show fewer tiles"
            )
        if not shape.rows:
            return [0] * count
        return [0, *(1 + row * most + column for row in range(shape.rows) for column in range(shape.columns))]


def count_tokens(shape: MediaShape, grids: Sequence[Grid3]) -> int:
    """How many tokens an item has, whose views have `grids` of tokens: all of theirs."""
    return sum(grid.size for grid in grids)
