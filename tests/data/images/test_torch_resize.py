"""torch's resize makes Pillow's pixels but for the last bit, whatever part of the picture is wanted."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_train.data.images import transform
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.images.torch_resize import resize_by_torch
from vlm_train.data.images.transform import ImageTransform, one_patch

SIZES = [(64, 48), (48, 64), (33, 50), (51, 34), (60, 90), (20, 20), (61, 7), (7, 61), (32, 32), (1, 9), (400, 3)]


def picture(width: int, height: int) -> Image.Image:
    """Smooth, as photographs are: where a cubic overshoots, the order of rows and columns would matter."""
    small = np.random.default_rng(width * 1000 + height).integers(40, 216, (height // 6 + 2, width // 6 + 2, 3))
    return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(image: Image.Image, *args: Any) -> np.ndarray:
    return resize_by_torch(np.asarray(image), *args).transpose(1, 2, 0)


def assert_close(ours: np.ndarray, pillow: np.ndarray) -> None:
    assert ours.shape == pillow.shape and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillow.astype(int)).max() <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize("view", [(32, 32), (24, 36)])
def test_views_are_those_of_pillow(size: tuple[int, int], mode: str, view: tuple[int, int]) -> None:
    data = encode(picture(*size))
    ours, pillow = (ImageTransform(mode=mode, size=view, resize=kind)(data) for kind in ("torch", "pillow"))
    assert_close(ours.values, pillow.values)


@pytest.mark.parametrize(
    "more", [{"flip": True}, {"random_resized_crop": [0.3, 0.6]}, {"rand_augment": {"num_ops": 1, "magnitude": 3}}]
)
def test_what_is_drawn_is_the_same(more: dict) -> None:
    data = encode(picture(64, 48))
    for seed in range(4):
        ours, pillow = (
            ImageTransform(mode="resize", size=(24, 24), resize=kind, **more)(data, np.random.default_rng(seed)).values
            for kind in ("torch", "pillow")
        )
        assert np.abs(ours.astype(int) - pillow.astype(int)).mean() < 1.0


@pytest.mark.parametrize("size", [(60, 3), (3, 60)])
def test_a_long_picture_is_padded_where_it_is_small(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MOST_PIXELS", 900)
    made, full = [], np.full
    monkeypatch.setattr(np, "full", lambda shape, *more: made.append(shape) or full(shape, *more))
    data = encode(picture(*size))
    ours, pillow = (ImageTransform(mode="pad", size=(16, 16), resize=kind)(data) for kind in ("torch", "pillow"))
    assert made == [(16, 16, 3)]
    assert_close(ours.values, pillow.values)


def test_a_part_is_that_of_the_whole() -> None:
    """The source is cropped first where that gives the same weights."""
    image = picture(120, 90)
    whole = rows_of(image, (56, 42))
    for corner, part in [((10, 3), (20, 30)), ((0, 0), (5, 42)), ((50, 40), (6, 2))]:
        columns, rows = (slice(at, at + count) for at, count in zip(corner, part, strict=True))
        assert_close(rows_of(image, (56, 42), corner, part), whole[rows, columns])


def test_what_lies_outside_is_black_as_in_a_crop_by_pillow() -> None:
    image = picture(40, 30)
    ours = rows_of(image, (20, 15), (-2, -3), (24, 21))
    assert not ours[:3].any() and not ours[:, :2].any() and not ours[18:].any() and not ours[:, 22:].any()
    assert_close(ours[3:18, 2:22], np.asarray(image.resize((20, 15), Image.Resampling.BICUBIC)))


def test_native_resolution_takes_it_too() -> None:
    data = encode(picture(100, 70))
    ours, pillow = (
        NativeResolution(patch_size=14, patch_grid=one_patch, resize=kind)(data) for kind in ("torch", "pillow")
    )
    assert_close(ours.values, pillow.values)


@pytest.mark.parametrize("size", [(64, 48), (20, 20), (61, 7), (37, 5), (1, 1)])
@pytest.mark.parametrize("view", [(32, 32), (9, 50), (100, 100)])
def test_hard_edges_are_those_of_pillow_that_begins_with_the_rows(size: tuple[int, int], view: tuple[int, int]) -> None:
    """Whatever order a release of Pillow takes: each of its passes by itself."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image, bicubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    assert_close(
        rows_of(image, view),
        np.asarray(image.resize((view[0], size[1]), bicubic).resize(view, bicubic)),
    )
