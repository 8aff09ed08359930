"""Features with a grid a view: rectangles, padding, grid by grid; what an encoder is given, cut in chunks."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import assert_close
from vlm_train.contracts.media import Features, Grid3, MediaInput, map_grids
from vlm_train.errors import BatchError

GRIDS = (Grid3(1, 2, 2), Grid3(2, 1, 3), Grid3(1, 2, 2), Grid3(1, 1, 1))


def ragged() -> Features:
    return Features(torch.randn(15, 3, generator=torch.Generator().manual_seed(0)), GRIDS)


def test_a_rectangle_goes_there_and_back() -> None:
    values = torch.randn(2, 6, 3)
    features = Features.from_rectangular(values, Grid3(1, 2, 3))
    assert torch.equal(features.rectangular(), values) and features.padded()[1] is None
    assert features.rectangular().data_ptr() == values.data_ptr()  # nothing is copied


def test_views_of_several_sizes_are_no_rectangle() -> None:
    with pytest.raises(BatchError, match="views of 1, 4, 6 features are no rectangle"):
        ragged().rectangular()


def test_more_values_than_the_grids_hold_are_refused() -> None:
    for read in (Features.rectangular, Features.padded):
        with pytest.raises(BatchError, match="14 values, but their grids hold 15"):
            read(Features(ragged().values[1:], GRIDS))


def test_padding_is_masked() -> None:
    values, mask = ragged().padded()
    assert values.shape == (4, 6, 3) and mask is not None and mask.sum(dim=1).tolist() == [4, 6, 4, 1]
    assert torch.equal(values[mask], ragged().values) and not values[~mask].any()
    expected = torch.stack([view.mean(dim=0) for view in ragged().values.split([4, 6, 4, 1])])
    assert_close(ragged().mean(), expected)


def test_a_function_runs_once_a_grid_and_gives_what_it_gives_alone() -> None:
    calls: list[tuple[tuple[int, ...], Grid3]] = []

    def flip(values: torch.Tensor, grid: Grid3) -> torch.Tensor:
        calls.append((tuple(values.shape), grid))
        return values.unflatten(1, grid).flip(3).sum(dim=1).flatten(1, 2)

    values = ragged().values.requires_grad_()
    found = map_grids(Features(values, GRIDS), flip, lambda grid: grid._replace(t=1))
    assert calls == [((2, 4, 3), GRIDS[0]), ((1, 6, 3), GRIDS[1]), ((1, 1, 3), GRIDS[3])]
    assert found.lengths == [4, 3, 4, 1]
    views = [flip(view[None], grid)[0] for view, grid in zip(values.split([4, 6, 4, 1]), GRIDS, strict=True)]
    assert torch.equal(found.values, torch.cat(views))
    weight = torch.randn(12, 3)
    ours, alone = (torch.autograd.grad((one * weight).sum(), values)[0] for one in (found.values, torch.cat(views)))
    assert torch.equal(ours, alone)


def test_input_is_cut_between_views() -> None:
    flat = MediaInput(torch.arange(15)[:, None], GRIDS, (1, 2))
    assert (len(flat), flat.views_total) == (4, 3)
    parts = flat.split(3)
    assert [part.grids for part in parts] == [GRIDS[:3], GRIDS[3:]]
    assert [part.values.flatten().tolist() for part in parts] == [list(range(14)), [14]]
    views = MediaInput(torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    assert [len(part) for part in views.split(2)] == [2, 2, 1]
