"""Tiles are cut as by InternVL's processor on Pillow, and counted before pixels are read."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.data.images.test_anyres import SIDE, SIZES
from tests.support.parity import encode, noise
from tests.support.videos import video
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.tiles import Tiles
from vlm_train.errors import ConfigError
from vlm_train.models.vision.hf import fixed_grid


def plan(**options) -> Tiles:
    return Tiles(size=(SIDE, SIDE), patch_grid=partial(fixed_grid, grid=Grid3(1, 4, 4)), **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 6), (1, 1)])
def test_pixels_are_those_of_internvl(size: tuple[int, int], least: int, most: int) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        min_patches=least,
        max_patches=most,
        do_rescale=False,
        do_normalize=False,
    )
    pixels = noise(*size)
    made = plan(min_tiles=least, max_tiles=most)
    views = made(encode(pixels))
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    assert views.values.dtype == np.uint8 and np.array_equal(views.values, expected)
    assert views.grids == made.grids(MediaSize(*size)) and views.shape == MediaShape()
    assert processor.get_number_of_image_patches(*reversed(size)) == len(views.grids)


def test_thirteen_views_at_most() -> None:
    made = plan()
    counts = {len(made.grids(MediaSize(width, height))) for width in range(1, 900, 37) for height in range(1, 900, 41)}
    assert max(counts) == 13 and min(counts) == 1


def test_images_of_a_sample_share_their_tiles() -> None:
    made, data = plan(share_tiles=True), encode(noise(200, 100))
    for images, tiles in ((1, 8), (2, 2), (7, 1), (20, 1)):
        known = made.grids(MediaSize(200, 100, images=images))
        assert made(data, images=images).grids == known and len(known) == tiles + (tiles > 1), images
    assert len(plan().grids(MediaSize(200, 100, images=7))) == 9


def test_without_a_thumbnail_there_are_tiles_alone() -> None:
    made = plan(thumbnail=False)
    assert len(made(encode(noise(200, 100))).grids) == len(made.grids(MediaSize(200, 100))) == 8


def test_a_video_has_one_view_of_each_used_frame() -> None:
    made = plan(frames=3)
    views = made(video(10, (64, 48)))
    assert views.shape == MediaShape(frames=3) and views.values.shape == (3, 3, SIDE, SIDE)
    assert made.grids(MediaSize(64, 48, frames=10, seconds=1.0)) == views.grids


@pytest.mark.parametrize("options", [{"min_tiles": 0}, {"min_tiles": 5, "max_tiles": 4}, {"frames": 0}])
def test_wrong_numbers_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"image: min_tiles \d, max_tiles \d+, frames \d; allowed"):
        plan(**options)
