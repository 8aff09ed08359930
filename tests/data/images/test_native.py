"""Native resolution: sizes as Qwen2-VL has them, patches that are the pixels, grids known before anything is read."""

from __future__ import annotations

import io
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data_pipelines.errors import BadSample
from data_pipelines.sample import MediaItem
from tests.data.text.rendering import load
from tests.out_of_tree.my_vlm.native_vit import count_patches
from tests.support.videos import video
from vlm_train.build import build_image_plan
from vlm_train.contracts.layout import MediaSize, NoMedia
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.images.video import measure_video
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.models.vision.qwen import count_patches as qwen_patches


def plan(patch_size: int = 14, **options: Any) -> NativeResolution:
    return NativeResolution(patch_size=patch_size, patch_grid=partial(count_patches, patch_size=patch_size), **options)


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(640, 480), (28, 28), (10, 15), (5000, 3000), (42, 70), (1, 150), (333, 777)])
def test_sizes_are_those_of_smart_resize(size: tuple[int, int]) -> None:
    width, height = size
    found = plan().view_size(MediaSize(width=width, height=height))
    expected = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=1_003_520)
    assert (found.height, found.width) == tuple(expected)


def test_patches_are_the_pixels_in_rows() -> None:
    pixels = noise(32, 48)
    views = plan(8, min_pixels=256)(encode(pixels))
    assert views.grids == ((1, 4, 6),) and views.values.shape == (24, 3 * 8 * 8) and views.values.dtype == np.uint8
    assert np.array_equal(views.values[7].reshape(3, 8, 8), pixels[8:16, 8:16].transpose(2, 0, 1))
    (whole,) = views.pictures()
    assert np.array_equal(whole, pixels.transpose(2, 0, 1))


def test_grids_are_known_before_pixels_are_read() -> None:
    native = plan(8, min_pixels=1024, max_pixels=4096, frames=3)
    for width, height in ((20, 20), (64, 32), (300, 40)):
        assert native.grids(MediaSize(width, height)) == native(encode(noise(height, width))).grids
    clip = native(video())
    assert clip.grids == native.grids(MediaSize(48, 40, frames=20)) and len(clip.grids) == 3
    assert len(native.blank().grids) == 1 and native.blank().grids == ((1, 2, 2),) and not native.blank().values.any()


def test_pairs_of_frames_of_a_variable_rate() -> None:
    """`fps` counts by the container's seconds, counts are even, and the grids are those of the pixels."""
    times = [0, 40, 80, 120, 160, 200, 240, 1000, 2000, 3000]
    data = video(10, rate=25, times=times)
    seconds = measure_video(data).seconds
    grid = partial(qwen_patches, patch_size=8, frames_per_patch=2)
    for fps, frames, used in ((None, 9, 8), (None, 3, 2), (1.0, 8, 2), (2.0, 8, 6), (25.0, 99, 10)):
        pairs = NativeResolution(
            patch_size=8, patch_grid=grid, frames_per_patch=2, min_pixels=256, max_pixels=1024, frames=frames, fps=fps
        )
        size = MediaSize(48, 40, frames=10, seconds=seconds)
        assert pairs.count_frames(size) == used, (fps, frames)
        views = pairs(data)
        assert views.grids == pairs.grids(size) and len(views.grids) == used // 2
        assert views.shape.frames == used and len(views.values) == sum(one.size for one in views.grids)


@pytest.mark.parametrize("count", range(2, 9))
def test_counts_of_frames_are_even_where_pairs_are_merged(count: int) -> None:
    pairs = NativeResolution(patch_size=8, patch_grid=partial(count_patches, patch_size=8), frames_per_patch=2)
    found = pairs.count_frames(MediaSize(48, 40, frames=count, seconds=count / 7))
    assert found % 2 == 0 and 2 <= found <= count


def test_a_picture_of_another_grid_than_planned_is_a_bad_sample() -> None:
    images = {"vision": plan(8, min_pixels=1024, max_pixels=4096)}
    processor = Processor(tokenizer=byte_level(), template=load("qa"), layout=NoMedia(), images=images)
    lying, upright = (MediaItem(name="0.png", width=w, height=h) for w, h in ((64, 32), (32, 64)))
    assert processor.make_views([encode(noise(32, 64))], media=[lying])["vision"][0].grids == ((1, 4, 8),)  # type: ignore[union-attr]
    with pytest.raises(BadSample, match="here: 0.png is not 32 x 64 pixels upright, as its entry says"):
        processor.make_views([encode(noise(32, 64))], media=[upright], where="here")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_pixels 100, .* at least 784 \(2 x 2 patches of 14 pixels\)"):
        plan(min_pixels=100)
    with pytest.raises(BadSample, match="here: image of 1000 x 4 pixels; one side is at most 200 times the other"):
        plan()(encode(noise(4, 1000)), where="here")


def test_a_damaged_video_names_its_place() -> None:
    with pytest.raises(BadSample, match=r"^shard 3, key a: cannot decode video") as caught:
        plan()(video()[:200], None, "shard 3, key a")
    assert caught.value.kind == "video"


def test_a_plan_fits_its_encoder() -> None:
    """Both kinds are built with what their encoder says; the wrong kind is named."""
    native, crop = (OmegaConf.load(f"conf/image/{name}.yaml") for name in ("native", "crop"))
    mean = (0.5, 0.5, 0.5)
    free = SimpleNamespace(
        image_size=None, image_mean=mean, patch_size=14, patch_grid=partial(count_patches, patch_size=14)
    )
    fixed = SimpleNamespace(image_size=(28, 28), image_mean=mean, patch_grid=partial(count_patches, patch_size=14))
    assert build_image_plan(native, free).grids(MediaSize(56, 84)) == ((1, 6, 4),)
    assert build_image_plan(crop, fixed).grids(MediaSize(56, 84)) == ((1, 2, 2),)
    with pytest.raises(ConfigError, match="makes views of one size, but the vision encoder takes native resolution"):
        build_image_plan(crop, free)
    with pytest.raises(ConfigError, match="makes flat patches, but the vision encoder takes views of 28 x 28 pixels"):
        build_image_plan(native, fixed)
