"""Blank input of any vision encoder, for dry runs, probes of exports and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_train.contracts.layout import MediaSize, untiled_shape
from vlm_train.contracts.media import Grid3, MediaInput

NATIVE_SIZE = MediaSize(width=448, height=448)
"""What stands for an image where the encoder has no size of its own."""


def typical_size(vision: Any) -> MediaSize:
    """The size of one view of an encoder."""
    if vision.image_size is None:
        return NATIVE_SIZE
    height, width = vision.image_size
    return MediaSize(width=width, height=height)


def count_typical_patches(vision: Any) -> int:
    """Patches of one view of that size."""
    size: int = vision.patch_grid(typical_size(vision)).size
    return size


def flat_width(vision: Any) -> int:
    """Numbers of a flat patch of an encoder of native resolution."""
    held: int = getattr(vision, "frames_per_patch", 1)
    return 3 * held * int(vision.patch_size) ** 2


class OneView:
    """What a media layout asks of an image plan: every image is one view of its encoder's own size."""

    def __init__(self, vision: Any) -> None:
        self.vision = vision

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grid of the view."""
        return (self.vision.patch_grid(typical_size(self.vision)),)


def blank_images(vision: Any, plan: Any, size: MediaSize, count: int) -> MediaInput:
    """What an encoder is given of `count` images of one size under an image plan, all zeros; on the default device."""
    grids = tuple(plan.grids(size))
    if (make := getattr(plan, "blank_input", None)) is not None:
        return make(size, count)
    if vision.image_size is None:
        shape: tuple[int, ...] = (count * sum(grid.size for grid in grids), flat_width(vision))
    else:
        shape = (count * len(grids), 3, *vision.image_size)
    made_up = getattr(plan, "shape", untiled_shape)(size)
    return MediaInput(torch.zeros(shape, dtype=torch.uint8), grids * count, (len(grids),) * count, (made_up,) * count)


def blank_input(vision: Any, views: int = 1, sizes: Sequence[MediaSize] = ()) -> MediaInput:
    """So many images of one view each, all zeros; on the default device.

    Args:
        sizes: of the views, for an encoder of native resolution; its `patch_size` is the side of a patch in pixels.
    """
    sizes = sizes or [typical_size(vision)] * views
    grids = tuple(vision.patch_grid(size) for size in sizes)
    if vision.image_size is None:
        shape: tuple[int, ...] = (sum(grid.size for grid in grids), flat_width(vision))
    else:
        shape = (len(sizes), 3, *vision.image_size)
    return MediaInput(torch.zeros(shape, dtype=torch.uint8), grids, (1,) * len(sizes))
