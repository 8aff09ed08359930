"""The mask builder against its rule, written out pair by pair."""

from __future__ import annotations

import pytest
import torch

from vlm_train.models.masks import attention_mask


def allowed(segments: list[int], groups: list[int], q: int, k: int) -> bool:
    if segments[q] != segments[k]:
        return False
    if groups[k] > 0 and groups[k] != groups[q]:
        return False
    return k <= q or (groups[k] == groups[q] and groups[k] < 0)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_rule(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(0, 3, (4, 11), generator=generator)
    groups = torch.randint(-2, 3, (4, 11), generator=generator)
    mask = attention_mask(segments, groups)
    assert mask.shape == (4, 1, 11, 11) and mask.dtype == torch.bool
    for row in range(4):
        s, g = segments[row].tolist(), groups[row].tolist()
        assert mask[row, 0].tolist() == [[allowed(s, g, q, k) for k in range(11)] for q in range(11)]
    assert mask.any(-1).all()  # no query is left without a key


def test_branches_see_the_prefix_and_themselves_and_an_image_sees_itself():
    mask = attention_mask(torch.tensor([[1, 1, 1, 1, 1, 0]]), torch.tensor([[0, -1, -1, 1, 2, 0]]))[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
