"""NaFlex: every image at the size whose patches come closest to a number, its aspect kept (SigLIP 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from PIL import Image

from data_pipelines.media.pictures import WHITE, Decoder
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3
from vlm_train.data.images.native import NativeResolution
from vlm_train.errors import ConfigError

STEP, LARGEST = 1e-5, 100.0
"""The scale of an image is found to within `STEP`, and is at most `LARGEST`."""


class NaflexResolution(NativeResolution):
    """One view of every image, and of every used frame of a video, of at most `max_num_patches` patches.

    Small images grow. Sides are rounded up to whole patches, and resampling is bilinear: pixels to the bit those of
    `Siglip2ImageProcessorPil` of `transformers`. Images of more than 200 to 1 are refused, as by `NativeResolution`.

    Args:
        patch_size, patch_grid, frames_per_patch, decode, background, frames, min_frames, fps: as in `NativeResolution`.
        max_num_patches: most patches of a view.
        merge: sides are multiples of so many patches, for connectors that join `merge` x `merge` of them; SigLIP 2: 1.
    """

    resample = Image.Resampling.BILINEAR

    def __init__(
        self,
        *,
        patch_size: int,
        patch_grid: Callable[[MediaSize], Grid3],
        frames_per_patch: int = 1,
        max_num_patches: int = 256,
        merge: int = 1,
        decode: Decoder = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
        min_frames: int = 1,
        fps: float | None = None,
    ) -> None:
        if merge >= 1 and max_num_patches < merge**2:
            raise ConfigError(f"image.max_num_patches: got {max_num_patches}; allowed: at least {merge} x {merge}")
        super().__init__(
            patch_size=patch_size, patch_grid=patch_grid, frames_per_patch=frames_per_patch, merge=merge,
            min_pixels=(patch_size * merge) ** 2, max_pixels=max_num_patches * patch_size**2,
            decode=decode, background=background, frames=frames, min_frames=min_frames, fps=fps,
        )  # fmt: skip
        self.most = max_num_patches // merge**2

    def view_size(self, size: MediaSize) -> MediaSize:
        """The size of the view of an image, or of a video's frame."""
        width, height = fit_patches(size.width, size.height, self.side, self.most)
        return MediaSize(width=width, height=height)


@lru_cache(maxsize=4096)
def fit_patches(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Width and height in whole squares of `side` pixels, at most `most` of them, of the largest such scale: found by
    halving, with the bounds of `get_image_size_for_max_num_patches` of `transformers`."""

    def scale_sides(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(width * scale / side)), max(1, math.ceil(height * scale / side))

    least, largest = STEP / 10, LARGEST
    while largest - least >= STEP:
        middle = (least + largest) / 2
        columns, rows = scale_sides(middle)
        least, largest = (middle, largest) if columns * rows <= most else (least, middle)
    columns, rows = scale_sides(least)
    return columns * side, rows * side
