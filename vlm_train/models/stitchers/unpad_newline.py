"""Tiles of an image joined again: margins cut off, a learned token behind every row (LLaVA-NeXT, LLaVA-OneVision).

Legend: R, C rows and columns of tiles, h, w tokens of a tile, H, W tokens of the image, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3, MediaInput, MediaShape
from vlm_train.errors import ConfigError

SCALED_FROM = 1.1
"""So many times the allowed side is still left as it is."""


class UnpadNewline(nn.Module):
    """The tokens of the view of all of an image; then those of its tiles, row by row of the whole image, without the
    rows or columns that show nothing but margin; the newline token behind every row. An image without tiles, or a
    video, has one newline token behind all of its tokens.

    As `pack_image_features` of `LlavaNextModel` and `LlavaOnevisionModel` in `transformers`.

    Args:
        out_dim: D; given by `build.py`.
        max_tiles: images with clearly more tokens than so many tiles are scaled down to them (bilinear); null: none.
        video_pool: the grid of a video's frame is scaled down by so much (bilinear, rounded up); null: it is not.
    """

    def __init__(self, *, out_dim: int, max_tiles: int | None = None, video_pool: int | None = None) -> None:
        super().__init__()
        for name, value in (("max_tiles", max_tiles), ("video_pool", video_pool)):
            if value is not None and value < 1:
                raise ConfigError(f"parts.stitcher.{name}: got {value}; allowed: at least 1, or null")
        self.max_tiles, self.video_pool = max_tiles, video_pool
        self.count_tokens = partial(count_tokens, max_tiles=max_tiles, video_pool=video_pool)
        self.newline = nn.Parameter(torch.randn(out_dim) / out_dim**0.5)

    def forward(self, features: Features, media: MediaInput) -> Features:
        """`[F, D]` of all views -> `[F', D]` of all media items, see `Stitcher`."""
        views = features.values.split(features.lengths)
        newline = self.newline.to(features.values.dtype)[None]
        parts, grids, first = list[Tensor](), list[Grid3](), 0
        for shape, count in zip(media.shapes, media.view_counts, strict=True):
            own = slice(first, first + count)
            tokens = self._join(shape, views[own], features.grids[own], newline)
            grids.append(Grid3(1, 1, sum(map(len, tokens))))
            parts += tokens
            first += count
        blank = [*views[first:], newline]  # of no item, so that the newline learns on every rank
        grids += [Grid3(1, 1, len(one)) for one in blank]
        return Features(torch.cat([*parts, *blank]), tuple(grids))

    def _join(
        self, shape: MediaShape, views: Sequence[Tensor], grids: Sequence[Grid3], newline: Tensor
    ) -> list[Tensor]:
        """The tokens of an item, from `[P, D]` of each of its views."""
        if shape.frames and self.video_pool:
            return [
                *(_scale_tokens(one, grid, _pool_grid(grid, self.video_pool)) for one, grid in zip(views, grids)),
                newline,
            ]
        if not shape.rows:
            return [*views, newline]
        grid = grids[1]
        rows, columns, height, width = _find_image(shape, grid, self.max_tiles)
        tiles = torch.stack([*views[1:]]).unflatten(0, (shape.rows, shape.columns)).unflatten(2, (grid.h, grid.w))
        image = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[rows, columns]  # [R, C, h, w, D] -> [H, W, D]
        if (height, width) != image.shape[:2]:
            flat = _scale_tokens(image.flatten(0, 1), Grid3(1, *image.shape[:2]), (height, width))
            image = flat.unflatten(0, (height, width))
        lines = torch.cat([image, newline.expand(height, 1, -1)], dim=1)
        return [views[0], lines.flatten(0, 1)]


def count_tokens(
    shape: MediaShape, grids: Sequence[Grid3], *, max_tiles: int | None = None, video_pool: int | None = None
) -> int:
    """How many tokens `UnpadNewline` makes of an item, whose views have `grids` of tokens."""
    if shape.frames and video_pool:
        return sum(math.prod(_pool_grid(grid, video_pool)) for grid in grids) + 1
    if not shape.rows:
        return sum(grid.size for grid in grids) + 1
    _, _, height, width = _find_image(shape, grids[1], max_tiles)
    return grids[0].size + height * (width + 1)


def _find_image(shape: MediaShape, grid: Grid3, max_tiles: int | None) -> tuple[slice, slice, int, int]:
    """Which rows and columns of the tiles' tokens show the image, and to how many of each they are scaled."""
    if grid.h == 1 and grid.w > 1:
        raise ConfigError(
            f"parts.stitcher: the {grid.w} tokens of a tile have no rows, so that tiles cannot be joined. Choose a "
            "connector that keeps the patch grid, and vision.keep_cls=false; or parts=none"
        )
    whole_height, whole_width = shape.rows * grid.h, shape.columns * grid.w
    top, left = 0, 0
    if shape.width / shape.height > whole_width / whole_height:
        top = (whole_height - int(round(shape.height * (whole_width / shape.width), 7))) // 2
    else:
        left = (whole_width - int(round(shape.width * (whole_height / shape.height), 7))) // 2
    height, width = whole_height - 2 * top, whole_width - 2 * left
    rows, columns = slice(top, top + height), slice(left, left + width)
    if max_tiles is not None:
        ratio = math.sqrt(height * width / (max_tiles * grid.h * grid.w))
        if ratio > SCALED_FROM:
            height, width = max(1, int(height // ratio)), max(1, int(width // ratio))
    return rows, columns, height, width


def _pool_grid(grid: Grid3, factor: int) -> tuple[int, int]:
    return math.ceil(grid.h / factor), math.ceil(grid.w / factor)


def _scale_tokens(tokens: Tensor, grid: Grid3, size: tuple[int, int]) -> Tensor:
    """`[P, D]` of one grid -> `[Q, D]` of another one, bilinear."""
    image = tokens.unflatten(0, (grid.h, grid.w)).permute(2, 0, 1)[None]
    return F.interpolate(image, size, mode="bilinear")[0].flatten(1).transpose(0, 1)
