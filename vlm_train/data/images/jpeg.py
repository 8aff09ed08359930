"""Ordinary JPEG files by simplejpeg, which leaves out Pillow's copies of the pixels. The pixels are the same: both call
libjpeg-turbo, by the same rules."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import JPEG_START, open_picture, read_orientation
from vlm_train.errors import ConfigError

Decoder = Literal["pillow", "simplejpeg"]


def check_decoder(decode: Decoder) -> None:
    """Raise `ConfigError` where simplejpeg is asked for and not installed."""
    if decode == "simplejpeg" and find_spec("simplejpeg") is None:
        raise ConfigError(
            "image.decode: got simplejpeg, which is not installed: pip install 'vlm-train[jpeg]'. "
            "Allowed without it: pillow."
        )


def decode_jpeg(data: bytes, *, upright: bool = True) -> np.ndarray | None:
    """`[H, W, 3]` uint8 of an ordinary JPEG file: the pixels that `decode_image` gives.

    None for all others, which Pillow has to read or to refuse: other formats, CMYK, pictures to be turned or too large,
    and files with the least damage. libjpeg-turbo mends some damage with a warning; `strict` makes that an error.
    """
    import simplejpeg

    if not data.startswith(JPEG_START):
        return None
    try:
        file = open_picture(data)
        if file.mode not in ("RGB", "L") or (upright and read_orientation(file) != 1):
            return None
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except (BadSample, ValueError, MemoryError):
        return None
    return pixels if pixels.shape == (file.height, file.width, 3) else None
