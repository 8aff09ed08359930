"""Collation: padding sides, where placeholders and supervised targets are, and the normalisation rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_train.data.batch import IGNORE
from vlm_train.data.collate import Item, collate, collate_prompts
from vlm_train.data.layout import PLACEHOLDER_ID, Slot
from vlm_train.data.render import Rendered
from vlm_train.data.streams import PlacedSlot, Stream

SIZE = (4, 6)


def stream(length: int, learned: int, slots: tuple[tuple[int, int], ...] = (), weight: float = 1.0) -> Stream:
    """`length` tokens, the last `learned` targets learned, and `(start, count)` runs of placeholders."""
    ids = np.arange(10, 10 + length)
    placed = []
    for item, (start, count) in enumerate(slots):
        ids[start : start + count] = PLACEHOLDER_ID
        placed.append(PlacedSlot(start, Slot(item, count)))
    labels, weights = np.full(length, IGNORE), np.zeros(length, np.float32)
    if learned:
        labels[-learned:], weights[-learned:] = np.arange(learned) + 50, weight
    return Stream(
        ids=ids,
        labels=labels,
        weights=weights,
        positions=np.arange(length),
        attention_group=np.arange(length, dtype=np.int32) % 2,
        slots=tuple(placed),
    )


def item(of: Stream, key: str = "a", weight: float = 1.0) -> Item:
    views = [np.full((1 + n, 3, *SIZE), n + len(of), np.uint8) for n in range(len(of.slots))]
    return Item(Rendered(key=key, streams={"llm": of}), views, source="s", weight=weight)


ITEMS = [item(stream(9, 2, ((1, 3), (5, 2)))), item(stream(4, 3), "b"), item(stream(6, 1, ((0, 4),)), "c")]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_on_the_asked_side(left):
    text = collate(ITEMS, SIZE, left=left).text["llm"]
    assert text.ids.shape == (3, 9) and text.positions.shape == (1, 3, 9)
    for row, one in enumerate(ITEMS):
        here = one.rendered.llm
        real = slice(9 - len(here), 9) if left else slice(0, len(here))
        pad = slice(0, 9 - len(here)) if left else slice(len(here), 9)
        for name in ("ids", "labels", "weights", "attention_group"):
            assert np.array_equal(getattr(text, name)[row, real], getattr(here, name)), name
        assert np.array_equal(text.positions[0, row, real], here.positions)
        assert (text.segment_ids[row, real] == 1).all() and (text.segment_ids[row, pad] == 0).all()
        assert (text.ids[row, pad] == 0).all() and (text.labels[row, pad] == IGNORE).all()
        assert (text.weights[row, pad] == 0).all()


@pytest.mark.parametrize("left", [False, True])
def test_slot_index_is_where_the_placeholders_are(left):
    batch = collate(ITEMS, SIZE, left=left)
    flat = batch.text["llm"].ids.reshape(-1)
    assert torch.equal(batch.media.slot_index, torch.nonzero(flat == PLACEHOLDER_ID).reshape(-1))
    assert batch.media.slot_counts == (3, 2, 4) and batch.media.view_counts == (1, 2, 1)
    assert batch.media.row.tolist() == [0, 0, 2] and batch.media.keys == ("a", "a", "c")
    assert batch.media.real == len(batch.media.pixels) == 4
    assert batch.media.pixels[:, 0, 0, 0].tolist() == [9, 10, 10, 6]


def test_slot_index_goes_item_by_item_when_the_text_has_them_in_another_order():
    one = stream(8, 1, ((4, 2), (1, 3)))  # item 0 stands after item 1
    media = collate([item(one)], SIZE).media
    assert media.slot_index.tolist() == [4, 5, 1, 2, 3] and media.slot_counts == (2, 3)


def test_supervised_is_where_the_labels_are():
    text = collate(ITEMS, SIZE).text["llm"]
    assert torch.equal(text.supervised, torch.nonzero(text.labels.reshape(-1) != IGNORE).reshape(-1))
    assert len(text.supervised) == 6


@pytest.mark.parametrize(
    ("rule", "each"),
    [("token", 2.0), ("source", 2.0), ("sample", 2.0 / 4), ("sqrt_length", 2.0 / 4**0.5)],
)
def test_normalisation_rules(rule, each):
    text = collate([item(stream(7, 4), weight=2.0)], SIZE, normalise=rule).text["llm"]
    torch.testing.assert_close(text.weights[0], torch.tensor([0.0] * 3 + [each] * 4))


def test_each_sample_weighs_the_same_whatever_its_length_and_target_weights():
    items = [item(stream(9, 7, weight=0.5)), item(stream(3, 1)), item(stream(3, 0))]
    weights = collate(items, SIZE, normalise="sample").text["llm"].weights.sum(1)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.0]))


def test_an_empty_list_gives_one_padding_row():
    batch = collate([], SIZE)
    text = batch.text["llm"]
    assert text.ids.tolist() == [[0]] and text.labels.tolist() == [[IGNORE]] and text.segment_ids.tolist() == [[0]]
    assert text.weights.sum() == 0 and text.supervised.tolist() == []
    assert batch.media.pixels.shape == (1, 3, *SIZE) and batch.media.real == 0
    assert batch.media.slot_index.tolist() == [] and batch.media.row.tolist() == []
    assert text.supervised.dtype == batch.media.slot_index.dtype == batch.media.row.dtype == torch.int64
    assert batch.keys == batch.sources == ((),)


def test_prompts_are_padded_on_the_left():
    text = collate_prompts([(one.rendered, one.views) for one in ITEMS], SIZE).text["llm"]
    assert (text.segment_ids[:, -1] == 1).all() and text.segment_ids[1].tolist() == [0] * 5 + [1] * 4
