"""Image and video bytes -> the uint8 views that a vision tower sees. Normalisation happens on the device, in the tower.

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
from data_pipelines.video import video_extension
from vlm_train.data.layout import MediaSize
from vlm_train.data.video import decode_frames
from vlm_train.errors import ConfigError

Mode = Literal["crop", "pad", "resize"]
ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP")


class ImageTransform:
    """One square or rectangular view of every image, and of every used frame of a video.

    Args:
        mode: "crop": shortest side to the tower's size, centre crop, as the CLIP processor does; "pad": expand to a
            square of the tower's mean colour, then resize (LLaVA-1.5, `expand2square`); "resize": both sides, aspect
            ignored.
        size: (height, width) in pixels of the tower's view; given by `build.py`.
        mean: per-channel mean in [0, 1] of the tower, the padding colour; given by `build.py`.
        flip: mirror at random with probability 0.5 while training; all frames of a video alike.
        frames: most frames of a video that are used, evenly spaced.
    """

    def __init__(
        self,
        *,
        mode: Mode = "crop",
        size: tuple[int, int],
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        flip: bool = False,
        frames: int = 8,
    ) -> None:
        if frames < 1:
            raise ConfigError(f"image.frames: {frames}; allowed: at least 1")
        self.mode = mode
        self.size = size
        self.fill = tuple(int(channel * 255) for channel in mean)
        self.flip = flip
        self.frames = frames

    def view_size(self, size: MediaSize) -> MediaSize:
        """The size in pixels of the view made of an image, which decides its patch grid."""
        del size
        return MediaSize(width=self.size[1], height=self.size[0])

    def view_count(self, size: MediaSize) -> int:
        """How many views are made of an image (1) or a video."""
        return min(size.frames, self.frames)

    def __call__(self, data: bytes, generator: np.random.Generator | None = None, where: str = "image") -> np.ndarray:
        """Decode and transform one image, or the used frames of one video; its first bytes tell which it is.

        Args:
            data: the encoded file.
            generator: source of randomness while training; None: deterministic.
            where: shard and key, for the message.

        Returns:
            uint8 `[V, 3, H, W]`; V is 1 for an image, see `view_count`.

        Raises:
            BadSample: the bytes are not a sound JPEG, PNG or WebP image, or MP4, WebM or Matroska video, of acceptable
                size.
        """
        if video_extension(data) is None:
            images = [decode_rgb(data, where)]
        else:
            images = [Image.fromarray(frame) for frame in decode_frames(data, count=self.frames, where=where)]
        mirror = self.flip and generator is not None and generator.random() < 0.5
        return np.stack([self._view(image, mirror) for image in images])

    def _view(self, image: Image.Image, mirror: bool) -> np.ndarray:
        """`[3, H, W]` of one decoded image."""
        height, width = self.size
        if self.mode == "crop":
            image = _shortest_side_then_crop(image, height, width)
        else:
            if self.mode == "pad":
                image = _expand_to_square(image, self.fill)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).transpose(2, 0, 1)


def decode_rgb(data: bytes, where: str = "image") -> Image.Image:
    """Decode an image file to RGB. Raises `BadSample` if it is corrupt, truncated, too large or of another format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"{where}: cannot decode image ({len(data)} bytes): {error}", kind="image") from error


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
