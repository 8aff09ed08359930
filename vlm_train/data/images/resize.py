"""A part of a resized image without the rest of it, where that gives the same pixels.

Pillow resizes a box of the source to a view. It weighs source pixels by the real position of each target pixel, the
same in both ways, as integers of 22 bits. So the pixels are equal unless the noise of floating point (about 1e-12
pixels) rounds a weight the other way, which is computed, or Pillow takes rows and columns in the other order, which
depends on the sizes and on its version and is tried once for every size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

BITS = 22  # of Pillow's weights, `PRECISION_BITS` in its Resample.c
NOISE = 1e-5  # more than ten times what 1e-12 pixels can change of a weight of so many bits
STEPS = 256  # a box has float32 corners: in steps of 1 / 256 they are exact up to 65,536 pixels

MOST_PIXELS = 2**26
"""Pixels that an image is resized to as a whole; of a larger one, only what is shown is made."""

Size = tuple[int, int]


def resized_part(image: Image.Image, size: Size, corner: Size, part: Size) -> Image.Image:
    """What `image.resize(size, BICUBIC).crop(...)` gives for the `part` (width, height) at `corner` (left, top); of a
    `size` of more than `MOST_PIXELS`, to the rounding of a few pixels."""
    if size[0] * size[1] > MOST_PIXELS:
        (left, top), (x, y) = corner, (image.width / size[0], image.height / size[1])
        right, bottom = min((left + part[0]) * x, image.width), min((top + part[1]) * y, image.height)
        return image.resize(part, Image.Resampling.BICUBIC, box=(left * x, top * y, right, bottom))
    if (box := _crop_box(image.size, size, corner, part)) is not None:
        return image.resize(part, Image.Resampling.BICUBIC, box=box)
    return _resized_then_cropped(image, size, corner, part)


def _resized_then_cropped(image: Image.Image, size: Size, corner: Size, part: Size) -> Image.Image:
    (left, top), (width, height) = corner, part
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


@lru_cache(maxsize=4096)
def _crop_box(source: Size, size: Size, corner: Size, part: Size) -> tuple[float, float, float, float] | None:
    """The part's place in an image of `source` pixels; None if that box gives other pixels or saves nothing."""
    columns, rows = (_source_span(*axis) for axis in zip(source, size, corner, part, strict=True))
    if columns is None or rows is None or size == part:
        return None
    box = columns[0], rows[0], columns[1], rows[1]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, source[::-1], dtype=np.uint8))
    cut, whole = noise.resize(part, Image.Resampling.BICUBIC, box=box), _resized_then_cropped(noise, size, corner, part)
    return box if cut.tobytes() == whole.tobytes() else None


def _source_span(source: int, target: int, start: int, count: int) -> tuple[float, float] | None:
    """Where pixels `start` to `start + count` of `target` lie in `source`; None if a box may give other pixels."""
    span = start * source / target, (start + count) * source / target
    if (start, count) == (0, target):
        return span
    if start < 0 or start * source * STEPS % target or count * source * STEPS % target:
        return None
    scale = source / target
    reach = max(scale, 1.0)
    centers = (np.arange(start, start + count) + 0.5)[:, None] * scale
    taps = np.floor(centers - 2 * reach) + np.arange(int(4 * reach) + 3)
    weights = np.where((taps >= 0) & (taps < source), _bicubic_weight((taps + 0.5 - centers) / reach), 0.0)
    exact = weights / weights.sum(axis=1, keepdims=True) * 2**BITS
    return span if np.abs(exact - np.floor(exact) - 0.5).min() > NOISE else None


def _bicubic_weight(distance: np.ndarray) -> np.ndarray:
    x = np.abs(distance)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
