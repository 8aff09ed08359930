"""Overlapping tiles are made as by Molmo2's image processor, and counted before pixels are read."""

from __future__ import annotations

from functools import partial
from inspect import getattr_static
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.support.parity import encode, noise
from tests.support.videos import video
from vlm_train.contracts.layout import CropLayout, MediaSize, Slot, ViewName, untiled_shape
from vlm_train.contracts.media import Grid3
from vlm_train.data.images.overlap import OverlappingTiles
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.attention_pool import find_view_cells
from vlm_train.models.connectors.pool import pooled_grid
from vlm_train.models.vision.hf import fixed_grid

theirs: Any = pytest.importorskip("transformers.models.molmo2.image_processing_molmo2")
SIDE, PATCH = 378, 14
SIZES = [(640, 480), (130, 400), (378, 378), (300, 1400), (113, 113), (5000, 5000)]


def plan(side: int = SIDE, patch: int = PATCH, **options: Any) -> OverlappingTiles:
    grid = Grid3(1, side // patch, side // patch)
    return OverlappingTiles(size=(side, side), patch_grid=partial(fixed_grid, grid=grid), **options)


class Backend:
    """Their methods, with what torchvision's resizing computes: it is not installed, and the class refuses."""

    _build_overlapping_crops = getattr_static(theirs.Molmo2ImageProcessor, "_build_overlapping_crops")
    make_patches = getattr_static(theirs.Molmo2ImageProcessor, "_image_batch_to_patches_and_grids")

    def resize(self, image: torch.Tensor, size: Any, antialias: bool, **options: Any) -> torch.Tensor:
        assert not antialias
        return interpolate(image, (size.height, size.width), mode="bilinear", align_corners=False)

    def rescale_and_normalize(self, image: torch.Tensor, *options: Any) -> torch.Tensor:
        return image


def reference(pixels: np.ndarray, side: int, patch: int, pool: int = 2) -> tuple[np.ndarray, list[int], np.ndarray]:
    """`Molmo2ImageProcessor`: views `[V, 3, H, W]` before normalization, token grids, the patches of every token."""
    processor, image = Backend(), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    margins = [4, 4] if side == SIDE else [1, 1]
    options: dict[str, Any] = dict.fromkeys(
        ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
    )
    grid, patches, cells = processor.make_patches(
        image, max_crops=8, overlap_margins=margins, crop_size=side, image_patch_size=patch, image_pooling_w=pool,
        image_pooling_h=pool, **options,
    )  # fmt: skip
    rows = patches[0].unflatten(1, (side // patch, side // patch)).unflatten(3, (patch, patch, 3))
    views = rows.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side, side)
    return views.numpy(), grid[0].tolist(), cells[0].numpy()


@pytest.mark.parametrize("size", SIZES[:-1])
def test_pixels_are_to_the_bit_those_of_transformers(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    views = plan()(encode(pixels))
    expected, _, _ = reference(pixels, SIDE, PATCH)
    assert views.values.dtype == np.uint8 and np.array_equal(views.values, expected)
    assert views.grids == plan().grids(MediaSize(*size)) and views.shape == plan().shape(MediaSize(*size))


def joined_places(made: OverlappingTiles, size: MediaSize) -> np.ndarray:
    """Numbers of the patches of all views, in the order of the whole view and the joined image."""
    from vlm_train.contracts.media import Features, MediaInput
    from vlm_train.models.layers.join_tiles import join_overlapping_tiles

    grids = made.grids(size)
    numbers = torch.arange(sum(grid.size for grid in grids))[:, None].double()
    media = MediaInput(torch.zeros(len(grids), 3, 1, 1), grids, (len(grids),), (made.shape(size),))
    joined = join_overlapping_tiles(Features(numbers, grids), media)
    assert joined.grids == (made.view_grid, made.shape(size).join_grid(made.view_grid))
    return joined.values[:, 0].long().numpy()


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_read_the_patches_that_they_read_in_transformers(size: tuple[int, int], pool: int) -> None:
    made, media = plan(), MediaSize(*size)
    places = np.append(joined_places(made, media), -1)  # the last one for cells beyond the border
    whole, image = made.view_grid, made.shape(media).join_grid(made.view_grid)
    of_image = find_view_cells(image, pool)
    cells = np.concatenate([find_view_cells(whole, pool), np.where(of_image < 0, -1, of_image + whole.size)])
    small = tuple(max(side // 8, 9) for side in size) if max(size) > 3000 else size  # the same grid from fewer pixels
    if small != size:
        assert made.tile_grid(MediaSize(*small)) == made.tile_grid(media)
    _, grid, expected = reference(noise(*small), SIDE, PATCH, pool)
    assert np.array_equal(places[cells], expected)
    assert [*pooled_grid(whole, pool)[1:], *pooled_grid(image, pool)[1:]] == grid


def official_grid(width: int, height: int, most: int = 8) -> tuple[int, int]:
    """select_tiling of olmo/preprocessing/image_preprocessor.py, written out."""
    h, w = max(height - 112, 1), max(width - 112, 1)
    best, best_scale = (0, 0), None
    grids = sorted(
        ((i, j) for i in range(1, 9) for j in range(1, 9) if i * j <= most), key=lambda g: (g[0] * g[1], g[0])
    )
    scales = [min(np.float32(i * 266) / np.float32(h), np.float32(j * 266) / np.float32(w)) for i, j in grids]
    for grid, scale in zip(grids, scales, strict=True):
        if all(one < 1 for one in scales):
            better = best_scale is None or scale > best_scale
        else:
            better = scale >= 1 and (best_scale is None or scale < best_scale)
        if better:
            best, best_scale = grid, scale
    return best


def test_grids_of_any_size_are_those_of_the_training_code_and_of_transformers() -> None:
    made, random = plan(), np.random.default_rng(0)
    sizes = [
        *np.exp(random.uniform(0, 9, (300, 2))).astype(int).clip(1).tolist(),
        [1, 1],
        [1, 9000],
        [9000, 1],
        [112, 5],
    ]
    for width, height in sizes:
        found = made.tile_grid(MediaSize(width, height))
        assert found == official_grid(width, height), (width, height)
        if min(width, height) > 112:  # there they differ: sides below the margins are negative, here and there 1
            assert found == theirs.compute_crop_geometry(height, width, 8, [4, 4], SIDE, PATCH)[:2], (width, height)


def image_string(grid: list[int]) -> list[str | int]:
    """Molmo2Processor.replace_image_token with the options of pretrain.py, runs of patches as their count."""
    whole_rows, whole_columns, rows, columns = grid
    row: list[str | int] = [columns, "<im_col>"]
    return ["<low_res_im_start>", whole_rows * whole_columns, "<im_end>", "<im_start>", *row * rows, "<im_end>"]


@pytest.mark.parametrize("size", SIZES[:4])
def test_layout_is_that_of_the_processor(size: tuple[int, int]) -> None:
    made = plan()
    layout_grids = partial(pooled_grid, pool=2), partial(pooled_grid, pool=3)
    layout = CropLayout(made.grids, made.shape, *layout_grids)
    pieces = layout([MediaSize(*size)])[0]
    _, grid, _ = reference(noise(*size), SIDE, PATCH)
    assert [one.count if isinstance(one, Slot) else one for one in pieces] == image_string(grid)
    (frames,) = layout([MediaSize(64, 48, frames=3, seconds=1.5)])
    counts = [one.count if isinstance(one, Slot) else one for one in frames]
    assert counts == ["<frame_start>", 81, "<frame_end>"] * 3
    views = CropLayout(lambda size: (Grid3(1, 4, 4),) * 2, untiled_shape, *layout_grids)
    counts = [one.count if isinstance(one, Slot) else one for one in views([MediaSize(9, 9)])[0]]
    assert counts == ["<low_res_im_start>", 4, "<im_end>"] * 2, "a plan without tiles to join"


def test_names_and_counts_follow_from_the_size() -> None:
    made = plan(frames=3)
    assert made.name_views(MediaSize(640, 400)) == (
        ViewName("whole"), *(ViewName("tile", row, column) for row in (1, 2) for column in (1, 2)),
    )  # fmt: skip
    assert made.name_views(MediaSize(40, 40, frames=3, seconds=1.0))[2] == ViewName("frame", number=3)
    counts = {len(made.grids(MediaSize(w, h))) for w in range(1, 3000, 137) for h in range(1, 3000, 141)}
    assert (min(counts), max(counts)) == (2, 9), "all of it, and 1 to 8 tiles"
    views = made(video(frames=5))
    assert len(views.values) == len(views.grids) == views.shape.frames == 3
    assert not made.blank().values.any() and made.blank().grids == (Grid3(1, 27, 27),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"side": 384},
            r"image: overlapping tiles need square views of whole patches, but .* 384 x 384 pixels and 27 x",
        ),
        ({"margins": [14, 13]}, r"image\.margins: \[14, 13\]; allowed: .* less than the 27 patches"),
        ({"margins": [4]}, r"image\.margins: \[4\]; allowed: \[beginning, end\]"),
        ({"max_tiles": 0}, r"image: max_tiles 0, frames 8; allowed: at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(**options)
