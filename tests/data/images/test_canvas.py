"""Views are made as by PerceptionLM's image transform, and counted before pixels are read."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from tests.support.parity import encode, noise
from tests.support.videos import video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.canvas import CanvasTiles, choose_canvas, list_canvases
from vlm_train.errors import ConfigError
from vlm_train.models.vision.hf import fixed_grid

SIDE = 32

# (rows, columns) of VariableSizeImageTransform in core/transforms/image_transform.py with size=448, by its own code.
CANVASES = {
    4: {(300, 800): (3, 1), (449, 448): (2, 2), (1920, 1080): (2, 2), (9000, 100): (1, 4), (100, 9000): (4, 1)},
    16: {
        (300, 800): (6, 2), (448, 448): (4, 4), (640, 480): (3, 4), (1920, 1080): (3, 5), (1080, 1920): (5, 3),
        (4000, 3000): (3, 4), (100, 9000): (16, 1), (3000, 2800): (4, 4),
    },
    36: {
        (300, 800): (9, 4), (448, 448): (6, 6), (640, 480): (5, 7), (480, 640): (7, 5), (1920, 1080): (4, 8),
        (1080, 1920): (8, 4), (4000, 3000): (3, 4), (9000, 100): (1, 36), (3000, 2800): (6, 6),
    },
}  # fmt: skip


def plan(**options: object) -> CanvasTiles:
    given: dict = {"max_tiles": 4} | options
    return CanvasTiles(size=(SIDE, SIDE), patch_grid=partial(fixed_grid, grid=Grid3(1, 4, 4)), **given)


@pytest.mark.parametrize("most", sorted(CANVASES))
def test_canvases_are_those_of_perceptionlm(most: int) -> None:
    assert {size: choose_canvas(*size, 448, most) for size in CANVASES[most]} == CANVASES[most]


def test_canvases_of_one_aspect_are_in_order_of_their_tiles() -> None:
    assert list_canvases(5)[1.0] == [(2, 2), (1, 1)] and set(list_canvases(2)) == {0.5, 2.0, 1.0}


@pytest.mark.parametrize("size", [(70, 40), (40, 70), (32, 32), (5, 500), (500, 300)])
def test_views_are_all_of_it_then_tiles(size: tuple[int, int]) -> None:
    pixels, made = noise(*size), plan()
    height, width = pixels.shape[:2]
    rows, columns = choose_canvas(width, height, SIDE, 4)
    views = made(encode(pixels))
    image = Image.fromarray(pixels)
    whole = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    large = np.asarray(image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC))
    tiles = [
        large[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(rows)
        for column in range(columns)
    ]
    assert np.array_equal(views.values, np.stack([whole, *tiles]).transpose(0, 3, 1, 2))
    given = MediaSize(width, height)
    assert (views.grids, views.shape) == (made.grids(given), made.shape(given))
    assert len(made.name_views(given)) == len(views.values) == 1 + rows * columns


def test_an_image_of_one_tile_has_two_views() -> None:
    views = plan(max_tiles=1)(encode(noise(40, 40)))
    assert len(views.values) == 2 and np.array_equal(views.values[0], views.values[1])


def test_an_image_beside_others_is_one_view() -> None:
    made, size = plan(), MediaSize(70, 40, images=2)
    views = made(encode(noise(70, 40)), images=2)
    assert made.name_views(size) == (ViewName("whole"),) and made.shape(size) == MediaShape() == views.shape
    assert len(views.values) == len(views.grids) == len(made.grids(size)) == 1


def test_a_video_is_a_view_a_frame() -> None:
    views = plan(frames=3)(video(frames=5))
    assert len(views.values) == len(views.grids) == views.shape.frames == 3
    assert len(plan(frames=3).grids(MediaSize(40, 40, frames=5, seconds=1.0))) == 3


@pytest.mark.parametrize("options", [{"max_tiles": 0}, {"frames": 0}])
def test_numbers_below_one_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"image: max_tiles .*, frames .*; allowed: at least 1 each"):
        plan(**options)
