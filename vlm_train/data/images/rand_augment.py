"""RandAugment with BLIP's distortions and strengths (Li et al. 2022, arXiv 2201.12086; LAVIS
`lavis/processors/randaugment.py`, `blip_processors.py`).

Every distortion is drawn with all its numbers first, so that the frames of a video are distorted alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = 10
"""The strongest level."""

GRAY = (128, 128, 128)
"""What fills the places where a distorted image has no pixel."""

BILINEAR = Image.Resampling.BILINEAR

Distort = Callable[[Image.Image, float], Image.Image]


def _warp_image(image: Image.Image, x: Sequence[float], y: Sequence[float]) -> Image.Image:
    """Every pixel from the place that x = `(a, b, c)`, a column + b row + c, and y give."""
    return image.transform(image.size, Image.Transform.AFFINE, (*x, *y), BILINEAR, fillcolor=GRAY)


DISTORTIONS: dict[str, tuple[Distort, float, bool]] = {
    "identity": (lambda image, _: image, 0, False),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, False),
    "brightness": (lambda image, by: ImageEnhance.Brightness(image).enhance(0.1 + by), 1.8, False),
    "sharpness": (lambda image, by: ImageEnhance.Sharpness(image).enhance(0.1 + by), 1.8, False),
    "shear_x": (lambda image, by: _warp_image(image, (1, by, 0), (0, 1, 0)), 0.3, True),
    "shear_y": (lambda image, by: _warp_image(image, (1, 0, 0), (by, 1, 0)), 0.3, True),
    "translate_x": (lambda image, by: _warp_image(image, (1, 0, by), (0, 1, 0)), 10, True),
    "translate_y": (lambda image, by: _warp_image(image, (1, 0, 0), (0, 1, by)), 10, True),
    "rotate": (lambda image, by: image.rotate(by, BILINEAR, fillcolor=GRAY), 30, True),
}
"""Name -> how, its amount at the strongest level (factors; shares; pixels; degrees), and whether that has a sign."""


def draw_distortions(num_ops: int, magnitude: float, generator: np.random.Generator) -> list[tuple[str, float]]:
    """`num_ops` distortions at level `magnitude` with their amounts, of which each is left out with probability 0.5."""
    names = list(DISTORTIONS)
    chosen = []
    for name in (names[int(number)] for number in generator.integers(len(names), size=num_ops)):
        _, most, signed = DISTORTIONS[name]
        sign = -1 if signed and generator.random() < 0.5 else 1
        if generator.random() < 0.5:
            chosen.append((name, sign * most * magnitude / LEVELS))
    return chosen


def distort_image(image: Image.Image, drawn: Sequence[tuple[str, float]]) -> Image.Image:
    """An RGB image after what `draw_distortions` gave, in its order; of the same size."""
    for name, amount in drawn:
        image = DISTORTIONS[name][0](image, amount)
    return image
