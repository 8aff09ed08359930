"""Native resolution: every image at its own size, as flat patches for an encoder without a size of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import WHITE, Decoder, Picture, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames
from vlm_train.data.images.tiles import resize_picture
from vlm_train.data.images.transform import Resizer
from vlm_train.data.images.video import decode_frames, measure_video
from vlm_train.errors import ConfigError

MOST_ELONGATED = 200
"""Longer over shorter side of an image, at most: as in Qwen2-VL's processor."""


class NativeResolution:
    """One view of every image, and of every used frame (or pair of frames) of a video, its sides rounded to whole
    patches.

    Args:
        patch_size: side of a patch in pixels; given by `build.py`.
        patch_grid: the encoder's patch grid of a view; given by `build.py`.
        frames_per_patch: frames that a patch of the encoder holds; given by `build.py`. An image is so many equal ones.
        merge: sides are multiples of so many patches, for connectors that join `merge` x `merge` of them.
        min_pixels, max_pixels: least and most pixels of a view; images outside are scaled, their aspect kept.
        decode: "pillow" or "simplejpeg", as in `ImageTransform`.
        resize: "pillow" or "torch", likewise.
        background: the color behind transparent pictures, 0 to 255 for red, green and blue; null: whatever color the
            file has there, black mostly.
        frames: most frames of a video that are used, evenly spaced; a multiple of `frames_per_patch` is.
        min_frames: least frames of a video, if it has as many.
        fps: frames of a second; null: as many as `frames`.
        frame_min_pixels, frame_max_pixels: as `min_pixels`, `max_pixels`, of the frame of a video; null: the same.
        video_max_pixels: of all used frames together, divided by `frames_per_patch`; null: no limit.
    """

    random = False
    resample = Image.Resampling.BICUBIC

    def __init__(
        self,
        *,
        patch_size: int,
        patch_grid: Callable[[MediaSize], Grid3],
        frames_per_patch: int = 1,
        merge: int = 2,
        min_pixels: int = 3136,
        max_pixels: int = 1_003_520,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
        min_frames: int = 1,
        fps: float | None = None,
        frame_min_pixels: int | None = None,
        frame_max_pixels: int | None = None,
        video_max_pixels: int | None = None,
    ) -> None:
        check_background(background)
        check_decoder(decode)
        self.side = patch_size * merge
        if merge < 1 or frames < 1:
            raise ConfigError(f"image: merge {merge}, frames {frames}; allowed: at least 1 each")
        if frames < max(frames_per_patch, min_frames):
            raise ConfigError(
                f"image: frames {frames}, min_frames {min_frames}; allowed: frames no less than min_frames, and than "
                f"the {frames_per_patch} that a patch of the encoder holds"
            )
        self.image_pixels = (min_pixels, max_pixels)
        self.frame_pixels = (frame_min_pixels or min_pixels, frame_max_pixels or max_pixels)
        for prefix, (least, most) in (("", self.image_pixels), ("frame_", self.frame_pixels)):
            if not self.side**2 <= least <= most:
                raise ConfigError(
                    f"image: {prefix}min_pixels {least}, {prefix}max_pixels {most}; allowed: {prefix}min_pixels at "
                    f"least {self.side**2} ({merge} x {merge} patches of {patch_size} pixels), {prefix}max_pixels at "
                    f"least {prefix}min_pixels"
                )
        self.patch_size, self.patch_grid, self.frames_per_patch = patch_size, patch_grid, frames_per_patch
        self.merge = merge
        self.frames, self.min_frames, self.fps, self.video_max_pixels = frames, min_frames, fps, video_max_pixels
        self.background = None if background is None else tuple(background)
        self.decode, self.resize = decode, resize

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (one) or a video (one for `frames_per_patch` used frames)."""
        views = self.count_frames(size) // self.frames_per_patch if size.is_video else 1
        return (self.patch_grid(self.view_size(size)),) * views

    def thin_grids(self) -> tuple[Grid3, ...]:
        """Patch grids of long and of small images, which a connector has to take like any other."""
        least = -(-min(self.image_pixels[0], self.frame_pixels[0]) // self.side**2)
        longest = max(least + 1 - least % 2, 3)
        sides = ((1, 1),) * (least == 1) + ((1, longest), (longest, 1), (longest, longest))
        return tuple(Grid3(1, rows * self.merge, columns * self.merge) for rows, columns in sides)

    def count_frames(self, size: MediaSize) -> int:
        """Used frames of a video, a multiple of `frames_per_patch`: as `smart_nframes` of qwen-vl-utils counts them."""
        wanted = size.seconds * self.fps if self.fps else size.frames
        found = int(min(max(wanted, self.min_frames), self.frames, size.frames))
        return max(found // self.frames_per_patch, 1) * self.frames_per_patch

    def view_size(self, size: MediaSize) -> MediaSize:
        """The size of the view of an image, or of a video's frame: that of Qwen2-VL's `smart_resize`."""
        side, pixels = self.side, size.width * size.height
        least, most = self.frame_pixels if size.is_video else self.image_pixels
        if size.is_video and self.video_max_pixels is not None:
            share = self.video_max_pixels / self.count_frames(size) * self.frames_per_patch
            most = max(min(most, int(share)), int(least * 1.05))
        width, height = (round(length / side) * side for length in (size.width, size.height))
        if width * height > most:
            shrink = math.sqrt(pixels / most)
            width, height = (max(side, int(length / shrink / side) * side) for length in (size.width, size.height))
        elif width * height < least:
            grow = math.sqrt(least / pixels)
            width, height = (math.ceil(length * grow / side) * side for length in (size.width, size.height))
        return MediaSize(width=width, height=height)

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is; a frame is as many as a patch holds."""
        return name_frames(len(self.grids(size))) if size.is_video else (ViewName("whole"),)

    def blank(self) -> Views:
        """A black view of the smallest size."""
        side = self.side
        return self._cut([np.zeros((side, side, 3), np.uint8)] * self.frames_per_patch, MediaShape())

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The flat patches `[P, 3 * frames_per_patch * p * p]` of an image or a video, see `ImagePlan`."""
        frames = 0
        if is_video(data):
            header = measure_video(data, where)
            size = MediaSize(header.width, header.height, header.frames, header.seconds)
            frames = self.count_frames(size)
            pictures: Sequence[Picture] = [*decode_frames(data, count=frames, where=where)]
        else:
            picture, (width, height) = decode_picture(data, where, decode=self.decode, background=self.background)
            size, pictures = MediaSize(width=width, height=height), [picture]
        width, height = size.width, size.height
        if max(width, height) > MOST_ELONGATED * min(width, height):
            raise BadSample(
                f"{where}: image of {width} x {height} pixels; one side is at most {MOST_ELONGATED} times the other",
                kind="image",
            )
        view = self.view_size(size)
        resized = [resize_picture(picture, view.width, view.height, self.resize, self.resample) for picture in pictures]
        if frames == 0:
            resized *= self.frames_per_patch
        return self._cut(resized + resized[-1:] * (frames - len(resized)), MediaShape(frames=frames))

    def _cut(self, pictures: list[np.ndarray], shape: MediaShape) -> Views:
        """Patches of pictures `[H, W, 3]` of one size, row by row; a patch holds `frames_per_patch` pictures."""
        p, held = self.patch_size, self.frames_per_patch
        height, width, _ = pictures[0].shape
        frames = np.stack(pictures).reshape(-1, held, height // p, p, width // p, p, 3)
        patches = frames.transpose(0, 2, 4, 6, 1, 3, 5)  # [views, rows, columns, 3, held, p, p]
        grid = self.patch_grid(MediaSize(width=width, height=height))
        return Views(patches.reshape(-1, 3 * held * p * p), (grid,) * (len(pictures) // held), shape, held)
