"""Image bytes -> the uint8 views that a vision tower sees. Normalisation happens on the device, in the tower.

Decoding is bounded (`Image.MAX_IMAGE_PIXELS`, no truncated files), and any random choice comes from the given
generator, so that it depends on the sample's address only.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from vlm_train.data.layout import MediaSize

Mode = Literal["crop", "pad", "resize"]
ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP")


class ImageTransform:
    """One square or rectangular view of every image.

    Args:
        mode: "crop": shortest side to the tower's size, centre crop, as the CLIP processor does; "pad": expand to a
            square of the tower's mean colour, then resize (LLaVA-1.5, `expand2square`); "resize": both sides, aspect
            ignored.
        size: (height, width) in pixels of the tower's view; given by `build.py`.
        mean: per-channel mean in [0, 1] of the tower, the padding colour; given by `build.py`.
        flip: mirror at random with probability 0.5 while training.
    """

    def __init__(
        self,
        *,
        mode: Mode = "crop",
        size: tuple[int, int],
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        flip: bool = False,
    ) -> None:
        self.mode = mode
        self.size = size
        self.fill = tuple(int(channel * 255) for channel in mean)
        self.flip = flip

    def view_size(self, size: MediaSize) -> MediaSize:
        """The size in pixels of the view made of an image, which decides its patch grid."""
        del size
        return MediaSize(width=self.size[1], height=self.size[0])

    def view_count(self, size: MediaSize) -> int:
        """Views made of a media item of this size."""
        del size
        return 1

    def __call__(self, data: bytes, generator: np.random.Generator | None = None, where: str = "image") -> np.ndarray:
        """Decode and transform one image.

        Args:
            data: the encoded file.
            generator: source of randomness while training; None: deterministic.
            where: shard and key, for the message.

        Returns:
            uint8 `[1, 3, H, W]`.

        Raises:
            BadSample: the bytes are not a sound JPEG, PNG or WebP image of acceptable size.
        """
        image = decode_rgb(data, where)
        height, width = self.size
        if self.mode == "crop":
            image = _shortest_side_then_crop(image, height, width)
        else:
            if self.mode == "pad":
                image = _expand_to_square(image, self.fill)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.flip and generator is not None and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))[None]


def decode_rgb(data: bytes, where: str = "image") -> Image.Image:
    """Decode an image file to RGB. Raises `BadSample` if it is corrupt, truncated, too large or of another format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"{where}: cannot decode image ({len(data)} bytes): {error}") from error


def _shortest_side_then_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that the shorter side fits, then crop the centre (rounding as the CLIP processor rounds)."""
    short = min(height, width)
    w, h = image.size
    new_w, new_h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    left, top = (new_w - width) // 2, (new_h - height) // 2
    return image.crop((left, top, left + width, top + height))


def _expand_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Centre the image on a square of colour `fill`."""
    w, h = image.size
    if w == h:
        return image
    side = max(w, h)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square
