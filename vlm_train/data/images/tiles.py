"""Tiles: every image as parts of one size, in the grid whose aspect is closest to the image's (InternVL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.media.pictures import WHITE, Decoder, Picture, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames, name_tiles
from vlm_train.data.images.torch_resize import resize_by_torch
from vlm_train.data.images.transform import Resizer, one_patch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError

TileGrid = tuple[int, int]
"""Rows and columns of tiles."""


class Tiles:
    """The image in the size of a grid of tiles, its aspect ignored, cut into them; behind several tiles a view of all
    of it. Every used frame of a video is one view. Nothing is random.

    Pixels are those of `GotOcr2ImageProcessor` of `transformers` on Pillow, InternVL's (`dynamic_preprocess` in
    internvl_chat/internvl/train/dataset.py).

    Args:
        size: (height, width) in pixels of the tower's view; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        min_tiles, max_tiles: least and most tiles of an image.
        share_tiles: the images of a sample share `max_tiles`, each has one at least (InternVL 2.5).
        thumbnail: add the view of all of an image that has several tiles.
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
        min_tiles: int = 1,
        max_tiles: int = 12,
        share_tiles: bool = False,
        thumbnail: bool = True,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        if not 1 <= min_tiles <= max_tiles or frames < 1:
            raise ConfigError(
                f"image: min_tiles {min_tiles}, max_tiles {max_tiles}, frames {frames}; allowed: at least 1 each, and "
                "max_tiles no less than min_tiles"
            )
        self.size, self.view_grid = size, patch_grid(MediaSize(width=size[1], height=size[0]))
        self.min_tiles, self.max_tiles, self.share_tiles = min_tiles, max_tiles, share_tiles
        self.thumbnail, self.decode, self.resize = thumbnail, decode, resize
        self.background, self.frames = None if background is None else tuple(background), frames

    def tile_grid(self, size: MediaSize) -> TileGrid:
        """Rows and columns of the tiles of an image."""
        most = max(self.min_tiles, self.max_tiles // size.images) if self.share_tiles else self.max_tiles
        return choose_closest_grid((size.width, size.height), self.size, self.min_tiles, most)

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (its tiles, then all of it) or a video (one a used frame)."""
        if size.is_video:
            return (self.view_grid,) * min(size.frames, self.frames)
        rows, columns = self.tile_grid(size)
        return (self.view_grid,) * (rows * columns + (self.thumbnail and rows * columns > 1))

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is."""
        if size.is_video:
            return name_frames(min(size.frames, self.frames))
        rows, columns = self.tile_grid(size)
        if rows * columns == 1:
            return (ViewName("whole"),)
        return name_tiles(rows, columns) + (ViewName("whole"),) * self.thumbnail

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
        rows, columns = self.tile_grid(MediaSize(width=w, height=h, images=images))
        whole = resize_picture(picture, columns * width, rows * height, self.resize)
        views = [*cut_tiles(whole, rows, columns)]
        if self.thumbnail and len(views) > 1:
            views.append(resize_picture(picture, width, height, self.resize))
        return Views(stack_views(views), (self.view_grid,) * len(views))


def choose_closest_grid(size: tuple[int, int], view: tuple[int, int], least: int, most: int) -> TileGrid:
    """The grid of `least` to `most` tiles whose aspect is closest to that of an image of `size` (width, height). Of
    equal ones the largest that the image fills by more than half; `view` is (height, width) of a tile."""
    (width, height), best, best_distance = size, (1, 1), float("inf")
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (rows, columns), distance
        elif distance == best_distance and width * height > 0.5 * view[0] * view[1] * rows * columns:
            best = (rows, columns)
    return best


def resize_picture(
    picture: Picture,
    width: int,
    height: int,
    resize: Resizer,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """`[height, width, 3]`, its aspect ignored; torch resamples by cubics only."""
    if resize == "torch":
        return resize_by_torch(np.asarray(picture), (width, height)).transpose(1, 2, 0)
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(image.resize((width, height), resample))


def cut_tiles(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`[H, W, 3]` -> its tiles `[rows * columns, H / rows, W / columns, 3]`, row by row."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    return image.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)


def stack_views(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures `[H, W, 3]` of one size -> `[V, 3, H, W]`."""
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
