"""Tiles on the canvas on which an image, its aspect kept, is largest; a view of all of it first (PerceptionLM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from data_pipelines.media.pictures import WHITE, Decoder, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames, name_tiles
from vlm_train.data.images.tiles import TileGrid, cut_tiles, resize_picture, stack_views
from vlm_train.data.images.transform import Resizer, one_patch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError


class CanvasTiles:
    """A view of all of the image, then its tiles row by row, one at least: the image in the size of a canvas of tiles,
    its aspect ignored. An image that its sample shows beside others is the one view of all of it; every used frame of a
    video is one view. Nothing is random.

    Pixels are to the bit what PerceptionLM makes (core/transforms/image_transform.py of
    github.com/facebookresearch/perception_models).

    Args:
        size: (height, width) in pixels of the tower's view, equal ones; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        max_tiles: most tiles of an image.
        decode: "pillow" or "simplejpeg", as in `ImageTransform`.
        resize: "pillow" or "torch", likewise.
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
        max_tiles: int = 36,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 32,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        if max_tiles < 1 or frames < 1 or size[0] != size[1]:
            raise ConfigError(
                f"image: max_tiles {max_tiles}, frames {frames}, tiles of {size[0]} x {size[1]} pixels; allowed: at "
                "least 1 each, and square tiles"
            )
        self.size, self.view_grid = size, patch_grid(MediaSize(width=size[1], height=size[0]))
        self.max_tiles, self.decode, self.resize = max_tiles, decode, resize
        self.background, self.frames = None if background is None else tuple(background), frames

    def tile_grid(self, size: MediaSize) -> TileGrid:
        """Rows and columns of the tiles of an image that is alone."""
        return choose_canvas(size.width, size.height, self.size[0], self.max_tiles)

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (all of it, then its tiles) or a video (one a used frame)."""
        return (self.view_grid,) * len(self.name_views(size))

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is."""
        if size.is_video:
            return name_frames(min(size.frames, self.frames))
        return (ViewName("whole"), *(name_tiles(*self.tile_grid(size)) if size.images == 1 else ()))

    def shape(self, size: MediaSize) -> MediaShape:
        """How the views of an item make it up; tiles have no margin."""
        if size.is_video:
            return MediaShape(frames=min(size.frames, self.frames))
        if size.images > 1:
            return MediaShape()
        (height, width), (rows, columns) = self.size, self.tile_grid(size)
        return MediaShape(width=columns * width, height=rows * height, rows=rows, columns=columns)

    def blank(self) -> Views:
        """A black view."""
        return Views(np.zeros((1, 3, *self.size), np.uint8), (self.view_grid,))

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The views `[V, 3, H, W]` of an image or a video, see `ImagePlan`."""
        height, width = self.size
        if is_video(data):
            frames = decode_frames(data, count=self.frames, where=where)
            views = [resize_picture(frame, width, height, self.resize) for frame in frames]
            return Views(stack_views(views), (self.view_grid,) * len(views), MediaShape(frames=len(views)))
        picture, (w, h) = decode_picture(data, where, decode=self.decode, background=self.background)
        given = MediaSize(width=w, height=h, images=images)
        views = [resize_picture(picture, width, height, self.resize)]
        if images == 1:
            rows, columns = self.tile_grid(given)
            views += [*cut_tiles(resize_picture(picture, columns * width, rows * height, self.resize), rows, columns)]
        return Views(stack_views(views), (self.view_grid,) * len(views), self.shape(given))


def choose_canvas(width: int, height: int, side: int, most: int) -> TileGrid:
    """Rows and columns of the canvas of at most `most` tiles that holds all pixels of an image and on which its shorter
    side is longest; where none holds it, of the canvas whose aspect is the closest one not longer than the image's.

    Args:
        width, height: of the image, in pixels.
        side: of a tile, in pixels.
    """
    aspect, best, longest = width / height, None, -1.0
    for columns, rows in (canvas for same in list_canvases(most).values() for canvas in same):
        if columns * side < width or rows * side < height:
            continue
        factor = min(columns * side / width, rows * side / height)
        if aspect == 1:
            short = factor * height
        else:
            short = math.floor(factor * width / aspect if aspect > 1 else factor * height * aspect)
        if short >= longest:  # the last of equal ones, which has the fewest tiles of its aspect
            best, longest = (rows, columns), short
    return best or _choose_closest(aspect, most)


def _choose_closest(aspect: float, most: int) -> TileGrid:
    """The largest canvas of the closest aspect between that of a square and `aspect`."""
    canvases = list_canvases(most)
    if aspect >= 1:
        closest = max(one for one in canvases if one <= aspect)
    else:
        closest = min(one for one in canvases if one > aspect)
    columns, rows = canvases[closest][0]
    return rows, columns


@lru_cache
def list_canvases(most: int) -> dict[float, list[tuple[int, int]]]:
    """Aspect -> columns and rows of all canvases of at most `most` tiles that have it, the largest first."""
    found: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(most, 0, -1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                found.setdefault(columns / (tiles // columns), []).append((columns, tiles // columns))
    return found
