"""A part of a resized image has the pixels that it has in the whole."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_train.data.images import resize

SOURCES = [(640, 480), (480, 640), (500, 375), (640, 427), (427, 640), (1024, 768), (320, 240), (97, 41), (336, 336)]


def crop_of(source: tuple[int, int], side: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Size, corner and part of the CLIP processor's crop."""
    w, h = source
    size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    return size, ((size[0] - side) // 2, (size[1] - side) // 2), (side, side)


@pytest.mark.parametrize("side", [56, 84, 336])
@pytest.mark.parametrize("source", SOURCES)
def test_pixels_are_those_of_resize_and_crop(source, side):
    noise = np.random.default_rng(1).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    image, (size, (left, top), part) = Image.fromarray(noise), crop_of(source, side)
    expected = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    assert np.array_equal(resize.resized_part(image, size, (left, top), part), expected)


def test_a_box_is_used_where_its_corners_are_exact():
    assert resize._crop_box((640, 480), *crop_of((640, 480), 336)) == (80, 0, 560, 480)
    assert resize._crop_box((640, 427), *crop_of((640, 427), 336)) is None


def test_no_box_where_pillow_goes_another_way(monkeypatch):
    resized_then_cropped = resize._resized_then_cropped

    def other(image, size, corner, part):
        rows_first = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
        return resized_then_cropped(rows_first, size, corner, part)

    monkeypatch.setattr(resize, "_resized_then_cropped", other)
    assert resize._crop_box.__wrapped__((640, 480), *crop_of((640, 480), 336)) is None


def test_no_box_where_a_weight_is_about_to_round_the_other_way(monkeypatch):
    assert resize._source_span(640, 448, 56, 336) is not None
    monkeypatch.setattr(resize, "NOISE", 0.4)
    assert resize._source_span(640, 448, 56, 336) is None
