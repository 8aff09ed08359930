"""Native resolution: every image at its own size, as flat patches for an encoder without a size of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import WHITE
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3
from vlm_train.data.images.decode import Picture, check_background, decode_pictures
from vlm_train.data.images.jpeg import Decoder, check_decoder
from vlm_train.data.images.plan import Views
from vlm_train.data.images.torch_resize import resize_by_torch
from vlm_train.data.images.transform import Resizer
from vlm_train.errors import ConfigError

MOST_ELONGATED = 200
"""Longer over shorter side of an image, at most: as in Qwen2-VL's processor."""


class NativeResolution:
    """One view of every image, and of every used frame of a video, its sides rounded to whole patches.

    Args:
        patch_size: side of a patch in pixels; given by `build.py`.
        patch_grid: the encoder's patch grid of a view; given by `build.py`.
        merge: sides are multiples of so many patches, for connectors that join `merge` x `merge` of them.
        min_pixels, max_pixels: least and most pixels of a view; images outside are scaled, their aspect kept.
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
        patch_size: int,
        patch_grid: Callable[[MediaSize], Grid3],
        merge: int = 2,
        min_pixels: int = 3136,
        max_pixels: int = 1_003_520,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        self.side = patch_size * merge
        if merge < 1 or frames < 1:
            raise ConfigError(f"image: merge {merge}, frames {frames}; allowed: at least 1 each")
        if not self.side**2 <= min_pixels <= max_pixels:
            raise ConfigError(
                f"image: min_pixels {min_pixels}, max_pixels {max_pixels}; allowed: min_pixels at least {self.side**2} "
                f"({merge} x {merge} patches of {patch_size} pixels), max_pixels at least min_pixels"
            )
        self.patch_size, self.patch_grid, self.frames = patch_size, patch_grid, frames
        self.background = None if background is None else tuple(background)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.decode, self.resize = decode, resize

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (one) or a video (one a used frame)."""
        return (self.patch_grid(self.view_size(size)),) * min(size.frames, self.frames)

    def view_size(self, size: MediaSize) -> MediaSize:
        """The size of the view of an image: that of Qwen2-VL's `smart_resize`."""
        side, pixels = self.side, size.width * size.height
        width, height = (round(length / side) * side for length in (size.width, size.height))
        if width * height > self.max_pixels:
            shrink = math.sqrt(pixels / self.max_pixels)
            width, height = (max(side, int(length / shrink / side) * side) for length in (size.width, size.height))
        elif width * height < self.min_pixels:
            grow = math.sqrt(self.min_pixels / pixels)
            width, height = (math.ceil(length * grow / side) * side for length in (size.width, size.height))
        return MediaSize(width=width, height=height)

    def blank(self) -> Views:
        """A black view of the smallest size."""
        side = self.side
        return self._cut([np.zeros((side, side, 3), np.uint8)])

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The flat patches `[P, 3 * p * p]` of an image or a video, see `ImagePlan`. Nothing is random."""
        pictures, _ = decode_pictures(data, where, frames=self.frames, decode=self.decode, background=self.background)
        return self._cut([self._resize(picture, where) for picture in pictures])

    def _resize(self, picture: Picture, where: str) -> np.ndarray:
        """`[H, W, 3]` in the size of its view."""
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        if max(width, height) > MOST_ELONGATED * min(width, height):
            raise BadSample(
                f"{where}: image of {width} x {height} pixels; one side is at most {MOST_ELONGATED} times the other",
                kind="image",
            )
        size = self.view_size(MediaSize(width=width, height=height))
        if self.resize == "torch":
            return resize_by_torch(np.asarray(picture), (size.width, size.height)).transpose(1, 2, 0)
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        return np.asarray(image.resize((size.width, size.height), Image.Resampling.BICUBIC))

    def _cut(self, pictures: list[np.ndarray]) -> Views:
        """Patches of pictures `[H, W, 3]`, row by row."""
        p = self.patch_size
        patches, grids = [], []
        for picture in pictures:
            rows, columns = picture.shape[0] // p, picture.shape[1] // p
            cut = picture.reshape(rows, p, columns, p, 3).transpose(0, 2, 4, 1, 3)
            patches.append(cut.reshape(rows * columns, 3 * p * p))
            grids.append(self.patch_grid(MediaSize(width=picture.shape[1], height=picture.shape[0])))
        return Views(np.concatenate(patches), tuple(grids))
