"""Image and video bytes -> pictures: decoding is bounded (`Image.MAX_IMAGE_PIXELS`, no truncated files)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import (
    SWAPPING,
    UNREADABLE,
    WHITE,
    open_picture,
    read_orientation,
    to_rgb,
    turn_upright,
)
from data_pipelines.media.video import is_video
from vlm_train.data.images.jpeg import Decoder, decode_jpeg
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError

Picture = Image.Image | np.ndarray
"""8-bit RGB, `[H, W, 3]` where it is an array."""


def decode_pictures(
    data: bytes,
    where: str = "image",
    *,
    frames: int,
    decode: Decoder = "pillow",
    draft: Callable[[int, int], tuple[int, int]] | None = None,
    upright: bool = True,
    background: Sequence[int] | None = WHITE,
) -> tuple[list[Picture], tuple[int, int]]:
    """The picture of an image, or up to `frames` of a video, evenly spaced; and the width and height of the file.

    `draft`: see `decode_image`; the others: see `ImageTransform`.

    Raises:
        BadSample: the file is corrupt, truncated, too large or of another format.
    """
    if is_video(data):
        found = decode_frames(data, count=frames, where=where)
        return [*found], (found.shape[2], found.shape[1])
    if decode == "simplejpeg" and draft is None and (pixels := decode_jpeg(data, upright=upright)) is not None:
        return [pixels], (pixels.shape[1], pixels.shape[0])
    image, size = decode_image(data, where, draft, upright=upright, background=background)
    return [image], size


def decode_image(
    data: bytes,
    where: str = "image",
    draft: Callable[[int, int], tuple[int, int]] | None = None,
    *,
    upright: bool = True,
    background: Sequence[int] | None = WHITE,
) -> tuple[Image.Image, tuple[int, int]]:
    """An image file as 8-bit RGB, and the width and height that its header names.

    `draft` maps these to the least width and height that are needed: the JPEG decoder may scale down to no less.
    `upright`, `background`: see `ImageTransform`.

    Raises:
        BadSample: the file is corrupt, truncated, too large or of another format.
    """
    try:
        file = open_picture(data)
        orientation = read_orientation(file) if upright else 1
        width, height = file.size[::-1] if orientation in SWAPPING else file.size
        if draft is not None:
            needed = draft(width, height)
            file.draft("RGB", needed[::-1] if orientation in SWAPPING else needed)  # does nothing to other than JPEG
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's texts name neither file nor sample
            file.load()
            return turn_upright(to_rgb(file, background), orientation), (width, height)
    except (BadSample, *UNREADABLE, MemoryError, OverflowError) as error:
        raise BadSample(f"{where}: cannot decode image ({len(data)} bytes): {error}", kind="image") from error


def check_background(background: Sequence[int] | None) -> None:
    """Raise `ConfigError` for what is no color."""
    if background is not None and not (len(background) == 3 and all(0 <= value <= 255 for value in background)):
        raise ConfigError(f"image.background: {[*background]}; allowed: [red, green, blue] of 0 to 255 each, or null")
