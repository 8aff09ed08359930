"""Overlapping tiles: all of an image as one view, then tiles that share margins with their neighbors (Molmo2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from data_pipelines.media.pictures import WHITE, Decoder, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames, name_tiles
from vlm_train.data.images.tiles import TileGrid, stack_views
from vlm_train.data.images.transform import one_patch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError


class OverlappingTiles:
    """The image in the size of one view, its aspect ignored; then in the size of a grid of tiles that overlap, cut into
    them. So a patch at the border of a tile has neighbors on all sides in one of them. Every used frame of a video is
    one view. Nothing is random.

    Pixels are to the bit those of `Molmo2ImageProcessor` of `transformers`: bilinear, without antialiasing. The grid of
    tiles is that of olmo/preprocessing/image_preprocessor.py of github.com/allenai/molmo2, which differs from the
    former only where a side is shorter than the margins.

    Args:
        size: (height, width) in pixels of the tower's view, equal ones; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        max_tiles: most tiles of an image, the view of all of it not counted.
        margins: patches at the beginning and the end of a tile that its neighbors show too.
        decode: "pillow" or "simplejpeg", as in `ImageTransform`.
        background: the color behind transparent pictures, 0 to 255 for red, green and blue; null: whatever color the
            file has there, black mostly.
        frames: most frames of a video that are used, evenly spaced.
    """

    random = False

    def __init__(
        self,
        *,
        size: tuple[int, int],
        patch_grid: Callable[[MediaSize], Grid3] = one_patch,
        max_tiles: int = 8,
        margins: Sequence[int] = (4, 4),
        decode: Decoder = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        if max_tiles < 1 or frames < 1:
            raise ConfigError(f"image: max_tiles {max_tiles}, frames {frames}; allowed: at least 1 each")
        self.size, self.view_grid = size, patch_grid(MediaSize(width=size[1], height=size[0]))
        if size[0] != size[1] or self.view_grid.h != self.view_grid.w or size[0] % self.view_grid.h:
            raise ConfigError(
                f"image: overlapping tiles need square views of whole patches, but the tower's have {size[0]} x "
                f"{size[1]} pixels and {self.view_grid.h} x {self.view_grid.w} patches; set vision.keep_cls=false and "
                "a vision.config.image_size that vision.config.patch_size divides"
            )
        if len(margins) != 2 or min(margins) < 0 or sum(margins) >= self.view_grid.h:
            raise ConfigError(
                f"image.margins: {[*margins]}; allowed: [beginning, end] of at least 0 each, together less than the "
                f"{self.view_grid.h} patches of a tile"
            )
        self.margins, self.max_tiles, self.decode = (margins[0], margins[1]), max_tiles, decode
        self.background, self.frames = None if background is None else tuple(background), frames
        self.patch = size[0] // self.view_grid.h
        self.margin = sum(margins) * self.patch

    def tile_grid(self, size: MediaSize) -> TileGrid:
        """Rows and columns of the tiles of an image."""
        height, width = (max(side - self.margin, 1) for side in (size.height, size.width))
        return choose_least_scaled(height, width, self.size[0] - self.margin, self.max_tiles)

    def shape(self, size: MediaSize) -> MediaShape:
        """How the views of an item make it up."""
        if size.is_video:
            return MediaShape(frames=min(size.frames, self.frames))
        rows, columns = self.tile_grid(size)
        return MediaShape(rows=rows, columns=columns, margins=self.margins)

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (all of it, then its tiles) or a video (one a used frame)."""
        shape = self.shape(size)
        return (self.view_grid,) * (shape.frames or 1 + shape.rows * shape.columns)

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is."""
        shape = self.shape(size)
        return name_frames(shape.frames) or (ViewName("whole"), *name_tiles(shape.rows, shape.columns))

    def blank(self) -> Views:
        """A black view."""
        return Views(np.zeros((1, 3, *self.size), np.uint8), (self.view_grid,))

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The views `[V, 3, H, W]` of an image or a video, see `ImagePlan`."""
        if is_video(data):
            frames = decode_frames(data, count=self.frames, where=where)
            views = [resize_bilinear(frame, self.size) for frame in frames]
            return Views(stack_views(views), (self.view_grid,) * len(views), MediaShape(frames=len(views)))
        picture, (width, height) = decode_picture(data, where, decode=self.decode, background=self.background)
        pixels, shape = np.asarray(picture), self.shape(MediaSize(width=width, height=height))
        step, side = self.size[0] - self.margin, self.size[0]
        canvas = resize_bilinear(pixels, (shape.rows * step + self.margin, shape.columns * step + self.margin))
        corners = [(row * step, column * step) for row in range(shape.rows) for column in range(shape.columns)]
        tiles = [canvas[top : top + side, left : left + side] for top, left in corners]
        views = [resize_bilinear(pixels, self.size), *tiles]
        return Views(stack_views(views), (self.view_grid,) * len(views), shape)


@lru_cache(maxsize=4096)
def choose_least_scaled(height: int, width: int, side: int, most: int) -> TileGrid:
    """The grid of at most `most` squares of `side` that an image of this size fills with the least enlargement, or, if
    it is larger than all of them, with the least reduction; of equal ones the one with the fewest tiles and rows."""
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    scales = (np.array(grids) * side).astype(np.float32) / np.array([height, width], np.float32)  # float32 as there
    scale = scales.min(axis=1)
    if (scale < 1).all():
        return grids[int(scale.argmax())]
    return grids[int(np.where(scale < 1, np.float32(np.inf), scale).argmin())]


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[H, W, 3]` uint8 in `size` (height, width), each pixel from its four nearest, rounded."""
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
    resized = interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized.round_().clamp_(0, 255).byte()[0].permute(1, 2, 0).numpy()
