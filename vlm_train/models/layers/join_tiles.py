"""Overlapping tiles joined to the image that they were cut from, patch by patch (Molmo2).

Legend: R, C rows and columns of tiles, h, w patches of a tile, H, W patches of the image, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_train.contracts.media import Features, Grid3, MediaInput, MediaShape


def join_overlapping_tiles(features: Features, media: MediaInput) -> Features:
    """The view of all of an image as it is, then its tiles as one view: each patch from the tile that shows it further
    from a border. Views of videos, and the blank one of a batch without media, stay."""
    views = features.values.split(features.lengths)
    parts, grids, first = list[Tensor](), list[Grid3](), 0
    for shape, count in zip(media.shapes, media.view_counts, strict=True):
        last = first + (1 if shape.rows else count)
        parts += views[first:last]
        grids += features.grids[first:last]
        if shape.rows:
            tile = features.grids[last]
            parts.append(_join(torch.stack(views[last : first + count]), tile, shape))
            grids.append(shape.join_grid(tile))
        first += count
    return Features(torch.cat([*parts, *views[first:]]), (*grids, *features.grids[first:]))


def count_joined_views(media: MediaInput) -> tuple[int, ...]:
    """Views of each media item behind `join_overlapping_tiles`."""
    return tuple(2 if shape.rows else count for shape, count in zip(media.shapes, media.view_counts, strict=True))


def _join(tiles: Tensor, grid: Grid3, shape: MediaShape) -> Tensor:
    """`[R * C, h * w, D]` -> `[H * W, D]`."""
    squares = tiles.unflatten(0, (shape.rows, shape.columns)).unflatten(2, (grid.h, grid.w))
    rows = [_inner(number, shape.rows, grid.h, shape.margins) for number in range(shape.rows)]
    columns = [_inner(number, shape.columns, grid.w, shape.margins) for number in range(shape.columns)]
    bands = [
        torch.cat([squares[r, c, row, column] for c, column in enumerate(columns)], dim=1) for r, row in enumerate(rows)
    ]
    return torch.cat(bands).flatten(0, 1)


def _inner(number: int, count: int, size: int, margins: tuple[int, int]) -> slice:
    """The patches of tile `number` of `count` in a line that none of its neighbors shows better."""
    return slice(margins[0] if number else 0, size - (margins[1] if number < count - 1 else 0))
