"""AnyRes makes the pixels and the counts of the processors of LLaVA-NeXT and LLaVA-OneVision on Pillow."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.support.parity import encode, noise
from tests.support.videos import video
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.anyres import AnyRes
from vlm_train.errors import ConfigError
from vlm_train.models.vision.hf import fixed_grid

SIDE, PATCH = 28, 7
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SIZES = [
    (28, 28),
    (56, 28),
    (28, 56),
    (90, 60),
    (61, 97),
    (300, 17),
    (5, 200),
    (1, 40),
    (40, 1),
    (333, 777),
    (3, 3),
    (84, 84),
]


def plan(**options) -> AnyRes:
    grid = partial(fixed_grid, grid=Grid3(1, SIDE // PATCH, SIDE // PATCH))
    return AnyRes(size=(SIDE, SIDE), patch_grid=grid, **options)


def pinpoints(grids) -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for rows, columns in grids]


def raw_options(grids) -> dict:
    """A processor that gives back the pixels themselves."""
    return {"image_grid_pinpoints": pinpoints(grids), "do_rescale": False, "do_normalize": False}


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_llava_next(size: tuple[int, int]) -> None:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **raw_options(NEXT)
    )
    pixels = noise(*size)
    views = plan()(encode(pixels))
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    assert views.values.dtype == np.uint8 and np.array_equal(views.values, expected)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_onevision(size: tuple[int, int]) -> None:
    grids = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5)]
    processor = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, **raw_options(grids))
    pixels = noise(*size)
    views = plan(grids=4)(encode(pixels))
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(views.values, expected)


@pytest.mark.parametrize("size", SIZES)
def test_several_images_are_padded_as_those_of_onevision(size: tuple[int, int]) -> None:
    mean = (0.48, 0.46, 0.41)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=mean, **raw_options(NEXT)
    )
    pixels = noise(*size)
    made = plan(mean=mean, tile_several=False)
    views = made(encode(pixels), images=2)
    expected = processor([[Image.fromarray(pixels)] * 2], return_tensors="np")["pixel_values"][0][:1]
    assert np.array_equal(views.values, expected)
    assert views.grids == made.grids(MediaSize(*size, images=2)) and views.shape == made.shape(
        MediaSize(*size, images=2)
    )
    assert len(made(encode(pixels), images=1).grids) > 1


def test_grids_and_shape_are_known_before_pixels_are_read() -> None:
    made = plan()
    for size in SIZES:
        views, known = made(encode(noise(*size))), MediaSize(*size)
        assert views.grids == made.grids(known) and views.shape == made.shape(known)
    assert made.shape(MediaSize(90, 60)) == MediaShape(width=90, height=60, rows=2, columns=2)


def test_torch_resizes_to_nearly_the_same_pixels() -> None:
    data = encode(np.asarray(Image.fromarray(noise(9, 6)).resize((90, 60), Image.Resampling.BICUBIC)))
    exact, fast = plan()(data).values.astype(int), plan(resize="torch")(data).values.astype(int)
    assert exact.shape == fast.shape and np.abs(exact - fast).max() <= 2


def test_a_video_has_one_view_of_each_used_frame() -> None:
    made = plan(frames=3)
    data = video(10, (64, 48))
    views = made(data)
    assert views.shape == MediaShape(frames=3) and views.values.shape == (3, 3, SIDE, SIDE)
    assert made.grids(MediaSize(64, 48, frames=10, seconds=1.0)) == views.grids


def test_a_blank_view_is_black() -> None:
    views = plan().blank()
    assert views.values.shape == (1, 3, SIDE, SIDE) and not views.values.any() and views.shape == MediaShape()


@pytest.mark.parametrize("grids", [[], 0, [[1, 2, 3]], [[0, 1]]])
def test_wrong_grids_are_refused(grids) -> None:
    with pytest.raises(ConfigError, match=r"image\.grids: .*; allowed: a list of"):
        plan(grids=grids)
