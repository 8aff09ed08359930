"""Features go to the placeholders of their item, and every item is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm_train.contracts.batch import MediaBatch, Slots
from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import BatchError
from vlm_train.models.layers.merge import merge_features

GRIDS = (Grid3(1, 1, 2), Grid3(1, 1, 1), Grid3(1, 1, 3), Grid3(1, 1, 4))  # the last view is the blank one
PLACES = torch.tensor([1, 2, 3, 5, 6, 7])


def merge(view_counts: tuple[int, ...], slot_counts: tuple[int, ...], values: int = 10) -> Tensor:
    media = MediaBatch(slot_counts=slot_counts, row=torch.zeros(len(slot_counts)).long(), keys=("a", "b"))
    features = Features(torch.arange(1.0, values + 1)[:, None], GRIDS)
    slots = Slots(index=PLACES, placeholders=len(PLACES))
    return merge_features(torch.zeros(2, 4, 1), features, view_counts, slots, media)


def test_views_of_an_item_are_joined_and_others_left_out() -> None:
    assert merge((2, 0, 1), (3, 0, 3)).flatten().tolist() == [0, 1, 2, 3, 0, 4, 5, 6]


@pytest.mark.parametrize(
    ("view_counts", "slot_counts", "values", "said"),
    [
        (
            (1, 2),
            (3, 3),
            10,
            r"media item 0 \(sample 'a'\) has 2 image features but 3 placeholders",
        ),  # the sum is right
        ((2, 1), (3, 4), 10, r"media item 1 \(sample 'b'\) has 3 image features but 4 placeholders"),
        ((2, 0, 1), (3, 0, 4), 10, r"media item 2 \(sample '\?'\) has 3 image features but 4 placeholders"),
        ((2, 1), (6,), 10, "the tower gave 2 media items, the text has slots for 1"),
        ((2,), (3,), 10, "6 placeholders in the text, but 3 media features for 6 of them"),
        ((2, 1), (3, 3), 9, "9 values, but their grids hold 10"),
    ],
)
def test_other_numbers_are_refused(
    view_counts: tuple[int, ...], slot_counts: tuple[int, ...], values: int, said: str
) -> None:
    with pytest.raises(BatchError, match=said):
        merge(view_counts, slot_counts, values)


def test_a_connector_of_another_width_is_named() -> None:
    media = MediaBatch(slot_counts=(2,), row=torch.zeros(1).long(), keys=("a",))
    slots = Slots(index=PLACES[:2], placeholders=2)
    features = Features(torch.zeros(2, 5), GRIDS[:1])
    with pytest.raises(BatchError, match="the connector gave features of width 5, the language model has width 1"):
        merge_features(torch.zeros(2, 4, 1), features, (1,), slots, media)
