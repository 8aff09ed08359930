"""The mask builder against its rule, written out pair by pair."""

from __future__ import annotations

import pytest
import torch

from vlm_train.data.collate import pack_sequences
from vlm_train.models.layers.masks import attention_mask, block_mask_rule, within_window


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


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_follow_the_same_rule(seed, window):
    """The rule of FlexAttention over packed tokens is the explicit mask, element by element."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 1, 9, 6]
    groups = torch.randint(-2, 3, (20,), generator=generator)
    sequences = pack_sequences([(0, 4), (4, 1), (5, 9), (14, 6)], 20)
    rule, index = block_mask_rule(sequences, groups, window), torch.arange(20)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    expected = attention_mask(segments[None], groups[None], window)[0, 0]
    assert torch.equal(rule(None, None, index[:, None], index[None, :]), expected)


def test_windows_count_what_a_token_sees():
    """Keys of other branches and samples do not use up a window."""
    segments, groups = torch.tensor([[1, 1, 1, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1, 2, 0]])
    near = within_window(attention_mask(segments, groups), 2)[0, 0].int()
    assert near.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
