"""Views are made as by nanoVLM's image processor, and counted before pixels are read."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.support.parity import encode, noise
from tests.support.videos import video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3
from vlm_train.data.images.longest_side import LongestSide
from vlm_train.errors import ConfigError
from vlm_train.models.vision.hf import fixed_grid

SIDE = 32
SIZES = [(200, 100), (100, 200), (31, 31), (32, 32), (33, 32), (500, 3), (3, 500), (129, 128), (96, 64)]


def plan(**options: object) -> LongestSide:
    given: dict = {"longest_side": 4 * SIDE} | options
    return LongestSide(size=(SIDE, SIDE), patch_grid=partial(fixed_grid, grid=Grid3(1, 4, 4)), **given)


def target(width: int, height: int, enlarge: bool) -> tuple[int, int]:
    """DynamicResize._get_new_hw of data/custom_transforms.py: (height, width)."""
    long, short = (width, height) if width >= height else (height, width)
    target_long = 4 * SIDE if enlarge else min(4 * SIDE, math.ceil(long / SIDE) * SIDE)
    target_short = max(math.ceil(short * (target_long / long) / SIDE) * SIDE, SIDE)
    return (target_short, target_long) if width >= height else (target_long, target_short)


def expected(pixels: np.ndarray, enlarge: bool) -> tuple[torch.Tensor, np.ndarray]:
    """DynamicResize, ToTensor and GlobalAndSplitImages: all of it as fractions, and the tiles."""
    height, width = target(pixels.shape[1], pixels.shape[0], enlarge)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    tiles = [
        resized[y : y + SIDE, x : x + SIDE].transpose(2, 0, 1)
        for y in range(0, height, SIDE)
        for x in range(0, width, SIDE)
    ]
    fractions = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255
    return interpolate(fractions, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0], np.stack(tiles)


@pytest.mark.parametrize("enlarge", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_nanovlm(size: tuple[int, int], enlarge: bool) -> None:
    pixels, made = noise(*size), plan(enlarge=enlarge)
    views = made(encode(pixels))
    whole, tiles = expected(pixels, enlarge)
    assert views.grids == made.grids(MediaSize(*size)) and views.values.dtype == np.uint8
    if len(tiles) == 1:
        assert np.array_equal(views.values, tiles)
        return
    assert np.array_equal(views.values[1:], tiles)
    assert np.abs(views.values[0] - 255 * whole.numpy()).max() <= 1.01


def test_names_and_counts_follow_from_the_size() -> None:
    made = plan()
    assert made.name_views(MediaSize(200, 100)) == (
        ViewName("whole"), *(ViewName("tile", row, column) for row in (1, 2) for column in (1, 2, 3, 4)),
    )  # fmt: skip
    assert plan(enlarge=False).name_views(MediaSize(20, 10)) == (ViewName("whole"),)
    assert made.name_views(MediaSize(40, 40, frames=3, seconds=1.0))[2] == ViewName("frame", number=3)
    counts = {len(made.grids(MediaSize(w, h))) for w in range(1, 600, 37) for h in range(1, 600, 41)}
    assert (min(counts), max(counts)) == (5, 17), "all of it, and 4 x 1 to 4 x 4 tiles"


def test_a_video_is_a_view_a_frame() -> None:
    made = plan(frames=3)
    views = made(video(frames=5))
    assert len(views.values) == len(views.grids) == views.shape.frames == 3


@pytest.mark.parametrize("longest", [SIDE - 1, SIDE + 1, 0])
def test_a_side_that_is_not_whole_tiles_is_refused(longest: int) -> None:
    with pytest.raises(ConfigError, match=r"image\.longest_side: .* tiles of 32 x 32 pixels; allowed: a multiple"):
        plan(longest_side=longest)
