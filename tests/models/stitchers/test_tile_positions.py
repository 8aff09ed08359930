"""Tiles carry the vectors of their row and column, in outputs and gradients as a written-out loop says."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close
from vlm_train.build import build_images, build_model
from vlm_train.config.compose import compose_config
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput, MediaShape
from vlm_train.data.collate import join_views
from vlm_train.data.images.anyres import AnyRes
from vlm_train.data.images.longest_side import LongestSide
from vlm_train.errors import ConfigError
from vlm_train.models.stitchers.tile_positions import TilePositions, count_tokens
from vlm_train.models.vision.hf import fixed_grid

SIDE, DIM = 16, 6
TOKENS = Grid3(1, 2, 2)
PLANS = {"longest_side": {"longest_side": 4 * SIDE, "enlarge": False}, "anyres": {"grids": 4}}


def make_plan(kind: str) -> LongestSide | AnyRes:
    made = LongestSide if kind == "longest_side" else AnyRes
    return made(size=(SIDE, SIDE), patch_grid=partial(fixed_grid, grid=TOKENS), **PLANS[kind])


def written_out(stitcher: TilePositions, values: torch.Tensor, media: MediaInput) -> torch.Tensor:
    """Tile by tile; values `[N, P, D]`."""
    views, first = list(values), 0
    for shape, count in zip(media.shapes, media.view_counts, strict=True):
        for row in range(shape.rows):
            for column in range(shape.columns):
                at = first + 1 + row * shape.columns + column
                views[at] = views[at] + stitcher.rows[row] + stitcher.columns[column]
        first += count
    return torch.cat(views)


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_random_images_equal_the_written_out_sum(kind: str) -> None:
    torch.manual_seed(0)
    plan, stitcher = make_plan(kind), TilePositions(out_dim=DIM, max_side=4, init_std=1.0)
    sizes = [(5, 5), *np.random.default_rng(0).integers(1, 120, (20, 2)).tolist()]
    shown = join_views([plan(encode(noise(*size))) for size in sizes], plan)
    assert {shape.rows * shape.columns > 1 for shape in shown.shapes} == {True, False}
    values = torch.randn(len(shown), TOKENS.size, DIM, requires_grad=True)
    got = stitcher(Features.from_rectangular(values, TOKENS), shown)
    expected = written_out(stitcher, values, shown)
    assert_close(got.values, expected)
    weight = torch.randn(got.values.shape)
    learned = [values, stitcher.rows, stitcher.columns]
    gradients = (torch.autograd.grad((one * weight).sum(), learned) for one in (got.values, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs)
    counted = [count_tokens(plan.shape(MediaSize(*size)), plan.grids(MediaSize(*size))) for size in sizes]
    assert got.lengths == counted and got.lengths == [grid.w for grid in got.grids]


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_a_wide_image_is_a_row_of_tiles(kind: str) -> None:
    plan = make_plan(kind)
    shape = plan(encode(noise(4 * SIDE, SIDE))).shape
    assert (shape.rows, shape.columns) == (1, 4) and shape == plan.shape(MediaSize(4 * SIDE, SIDE))


def test_a_batch_without_tiles_moves_nothing_and_learns_nothing() -> None:
    stitcher = TilePositions(out_dim=DIM)
    values = torch.randn(4, TOKENS.size, DIM)
    media = MediaInput(torch.zeros(4), (TOKENS,) * 4, (1, 2), (MediaShape(), MediaShape(frames=2)))
    got = stitcher(Features.from_rectangular(values, TOKENS), media)
    assert torch.equal(got.values, values.flatten(0, 1)) and got.lengths == [4, 8, 4]
    got.values.sum().backward()
    assert stitcher.rows.grad is not None and not stitcher.rows.grad.any()  # but takes part, for all ranks to agree


def test_too_many_tiles_are_refused() -> None:
    stitcher = TilePositions(out_dim=DIM, max_side=2)
    media = MediaInput(torch.zeros(4), (TOKENS,) * 4, (4,), (MediaShape(48, 16, 1, 3),))
    features = Features.from_rectangular(torch.zeros(4, TOKENS.size, DIM), TOKENS)
    with pytest.raises(ConfigError, match=r"parts\.stitcher\.max_side: an image has 1 x 3 tiles; allowed: at most 2"):
        stitcher(features, media)
    with pytest.raises(ConfigError, match=r"parts\.stitcher\.max_side: got 0"):
        TilePositions(out_dim=DIM, max_side=0)


def test_the_recipe_has_512_pixel_tiles_with_positions() -> None:
    cfg = compose_config(
        ["recipe=tiled_gpt4v_style", "tokenizer=byte_level", "vision.weights=null", "llm.weights=null"]
    )
    model = build_model(cfg, meta=True)
    plan = build_images(cfg, model)["vision"]
    assert plan.size == (512, 512) and len(plan.grids(MediaSize(2048, 1536))) == 1 + 4 * 3
    assert len(plan.grids(MediaSize(300, 200))) == 1 and model.stitcher.rows.shape == (4, 960)
    assert sum(one.numel() for one in model.stitcher.parameters()) == 8 * 960
    assert [(rule.match, rule.lr) for rule in cfg.params.rules][0] == (r"(connector|stitcher)\..*", 0.00512)
