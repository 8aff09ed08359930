"""Tiles of an image whose longest side has a set length, its aspect kept but for whole tiles (nanoVLM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.media.pictures import WHITE, Decoder, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames, name_tiles
from vlm_train.data.images.tiles import TileGrid, cut_tiles, resize_picture, stack_views
from vlm_train.data.images.transform import Resizer, one_patch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError


class LongestSide:
    """A view of all of the image, then its tiles row by row; an image of one tile has the one view. Every used frame of
    a video is one view. Nothing is random.

    Tiles are to the bit what nanoVLM makes (data/custom_transforms.py of github.com/huggingface/nanoVLM), the view of
    all of it but for 1 of 255: it is made of bytes here, of fractions there.

    Args:
        size: (height, width) in pixels of the tower's view, equal ones; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        longest_side: most pixels of the longer side, whole tiles of them.
        enlarge: images that are smaller grow to it; false: to whole tiles only.
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
        longest_side: int = 2048,
        enlarge: bool = True,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        if frames < 1:
            raise ConfigError(f"image.frames: {frames}; allowed: at least 1")
        if size[0] != size[1] or longest_side < size[0] or longest_side % size[0]:
            raise ConfigError(
                f"image.longest_side: {longest_side} with tiles of {size[0]} x {size[1]} pixels; allowed: a multiple "
                "of the side of square tiles"
            )
        self.size, self.view_grid = size, patch_grid(MediaSize(width=size[1], height=size[0]))
        self.longest_side, self.enlarge, self.decode, self.resize = longest_side, enlarge, decode, resize
        self.background, self.frames = None if background is None else tuple(background), frames

    def tile_grid(self, size: MediaSize) -> TileGrid:
        """Rows and columns of the tiles of an image."""
        side, (short, long) = self.size[0], sorted((size.width, size.height))
        longest = self.longest_side if self.enlarge else min(self.longest_side, math.ceil(long / side) * side)
        most, least = longest // side, max(math.ceil(short * (longest / long) / side), 1)
        return (least, most) if size.width >= size.height else (most, least)

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (all of it, then its tiles) or a video (one a used frame)."""
        return (self.view_grid,) * len(self.name_views(size))

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is."""
        if size.is_video:
            return name_frames(min(size.frames, self.frames))
        rows, columns = self.tile_grid(size)
        return (ViewName("whole"), *(name_tiles(rows, columns) if rows * columns > 1 else ()))

    def shape(self, size: MediaSize) -> MediaShape:
        """How the views of an item make it up; tiles have no margin."""
        if size.is_video:
            return MediaShape(frames=min(size.frames, self.frames))
        (height, width), (rows, columns) = self.size, self.tile_grid(size)
        if rows * columns == 1:
            return MediaShape()
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
        rows, columns = self.tile_grid(given)
        resized = resize_picture(picture, columns * width, rows * height, self.resize)
        views = [resized]
        if rows * columns > 1:
            whole = Image.fromarray(resized).resize((width, height), Image.Resampling.BILINEAR)
            views = [np.asarray(whole), *cut_tiles(resized, rows, columns)]
        return Views(stack_views(views), (self.view_grid,) * len(views), self.shape(given))
