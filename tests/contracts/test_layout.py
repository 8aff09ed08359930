"""The media layout of models with placeholders: their number, their grid and what stands around them."""

from __future__ import annotations

import pytest

from vlm_train.contracts.layout import GridLayout, MediaSize, Slot
from vlm_train.contracts.media import Grid3


@pytest.mark.parametrize(
    "grids, joined",
    [
        ([Grid3(1, 2, 3), Grid3(2, 2, 3)], (3, 2, 3)),
        ([Grid3(1, 2, 3), Grid3(1, 3, 3)], (1, 1, 15)),
        ([Grid3(1, 2, 3)], (1, 2, 3)),
    ],
)
def test_grids_that_follow_each_other(grids: list[Grid3], joined: tuple[int, int, int]) -> None:
    layout = GridLayout(lambda size: grids, lambda grid: grid, before=("<a>",), after=("<b>",))
    image, video = layout([MediaSize(8, 8), MediaSize(8, 8, frames=2, seconds=3.0)])
    count = joined[0] * joined[1] * joined[2]
    assert image == ["<a>", Slot(0, count, Grid3(*joined)), "<b>"]
    assert video == ["<a>", Slot(1, count, Grid3(*joined), 3.0), "<b>"]
