"""Token grids that connectors make of patch grids."""

from __future__ import annotations

from vlm_train.contracts.media import Grid3


def same_grid(grid: Grid3) -> Grid3:
    """The token grid of connectors that keep one token a patch."""
    return grid
