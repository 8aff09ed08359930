"""Collation: padding sides, where features and supervised targets go, what is refused, the normalization rules."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlm_train.contracts.batch import IGNORE
from vlm_train.contracts.layout import PLACEHOLDER_ID, Slot
from vlm_train.contracts.media import Grid3
from vlm_train.data.collate import Example, collate_prompts
from vlm_train.data.collate import collate_rows as collate_rows
from vlm_train.data.images.plan import Views
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.text.render import TokenizedSample
from vlm_train.data.text.streams import PlacedSlot, Stream
from vlm_train.errors import BatchError

SIZE = (4, 6)
PLANS = {"vision": ImageTransform(size=SIZE)}


def collate(items, *args, **options):
    """Every item in a row of its own."""
    return collate_rows([[item] for item in items], *args, **options)


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
        positions=np.arange(length)[None],
        attention_group=np.arange(length, dtype=np.int32) % 2,
        slots=tuple(placed),
    )


def given(views):
    """Arrays `[V, 3, H, W]` of media items as one encoder has them."""
    return {"vision": [None if one is None else Views(one, (Grid3(1, 1, 1),) * len(one)) for one in views]}


def item(of: Stream, key: str = "a", weight: float = 1.0, **more: Stream) -> Example:
    items = sorted({placed.slot.item for one in (of, *more.values()) for placed in one.slots})
    views = [np.full((1 + n, 3, *SIZE), n + len(of), np.uint8) for n in range(max(items, default=-1) + 1)]
    rendered = TokenizedSample(key=key, streams={"llm": of, **more}, media=tuple(items))
    return Example(rendered, given(views), source="s", weight=weight)


ITEMS = [item(stream(9, 2, ((1, 3), (5, 2)))), item(stream(4, 3), "b"), item(stream(6, 1, ((0, 4),)), "c")]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_on_the_asked_side(left):
    text = collate(ITEMS, PLANS, left=left).text["llm"]
    assert text.ids.shape == (3, 9) and text.positions.shape == (1, 3, 9)
    for row, one in enumerate(ITEMS):
        here = one.rendered.llm
        real = slice(9 - len(here), 9) if left else slice(0, len(here))
        pad = slice(0, 9 - len(here)) if left else slice(len(here), 9)
        for name in ("ids", "labels", "weights", "attention_group"):
            assert np.array_equal(getattr(text, name)[row, real], getattr(here, name)), name
        assert np.array_equal(text.positions[:, row, real], here.positions)
        assert (text.segment_ids[row, real] == 1).all() and (text.segment_ids[row, pad] == 0).all()
        assert (text.ids[row, pad] == 0).all() and (text.labels[row, pad] == IGNORE).all()
        assert (text.weights[row, pad] == 0).all()


@pytest.mark.parametrize("left", [False, True])
def test_slots_are_where_the_placeholders_are(left):
    batch = collate(ITEMS, PLANS, left=left)
    text = batch.text["llm"]
    assert torch.equal(text.slots.index, torch.nonzero(text.ids.reshape(-1) == PLACEHOLDER_ID).reshape(-1))
    assert text.slots.placeholders == 9 and text.slots.feature_index is None
    assert batch.media.slot_counts == (3, 2, 4) and batch.media.inputs["vision"].view_counts == (1, 2, 1)
    assert batch.media.row.tolist() == [0, 0, 2] and batch.media.keys == ("a", "a", "c")
    assert batch.media.inputs["vision"].views_total == len(batch.media.inputs["vision"].values) == 4
    assert batch.media.inputs["vision"].values[:, 0, 0, 0].tolist() == [9, 10, 10, 6]


def test_features_follow_their_item_when_the_text_has_the_items_in_another_order():
    swapped = stream(8, 1, ((4, 2), (1, 3)))  # item 0 stands after item 1
    swapped = replace(swapped, slots=swapped.slots[::-1])  # slots are from left to right
    batch = collate([item(swapped), item(stream(4, 1, ((0, 1),)), "b")], PLANS)
    slots, shown = batch.text["llm"].slots, batch.media.inputs["vision"]
    assert batch.media.slot_counts == (2, 3, 1) and batch.media.keys == ("a", "a", "b")
    assert shown.view_counts == (1, 2, 1) and shown.values[:, 0, 0, 0].tolist() == [8, 9, 9, 4]
    assert slots.index.tolist() == [1, 2, 3, 4, 5, 8] and slots.feature_index.tolist() == [2, 3, 4, 0, 1, 5]


def test_every_stream_has_slots_of_its_own():
    """Each stream is as wide as its own samples; a stream may show fewer media than another."""
    one = item(stream(5, 1, ((1, 2),)), rejected=stream(9, 1, ((3, 2),)))
    two = item(stream(4, 1, ((0, 3),)), "b", rejected=stream(2, 1))
    batch = collate([one, two], PLANS)
    chosen, rejected = batch.text["llm"].slots, batch.text["rejected"].slots
    assert chosen.index.tolist() == [1, 2, 5, 6, 7] and chosen.feature_index is None
    assert rejected.index.tolist() == [3, 4] and rejected.feature_index.tolist() == [0, 1]
    assert batch.media.slot_counts == (2, 3)


def test_an_item_may_stand_in_several_places_and_in_several_runs():
    twice = stream(12, 1, ((1, 2), (4, 3)))
    twice.ids[8:10] = PLACEHOLDER_ID
    again = (PlacedSlot(8, Slot(0, 2)),)
    slots = collate([item(replace(twice, slots=twice.slots + again))], PLANS).text["llm"].slots
    assert slots.index.tolist() == [1, 2, 4, 5, 6, 8, 9] and slots.feature_index.tolist() == [0, 1, 2, 3, 4, 0, 1]
    parts = (PlacedSlot(1, Slot(0, 2)), PlacedSlot(4, Slot(0, 3), offset=2), PlacedSlot(8, Slot(0, 2), offset=5))
    batch = collate([item(replace(twice, slots=parts))], PLANS)  # an item between literal tokens
    assert batch.media.slot_counts == (7,) and batch.text["llm"].slots.feature_index is None


def test_media_that_stand_nowhere_are_left_out():
    one = item(stream(6, 1, ((1, 2),)))
    shown = [None, np.full((1, 3, *SIZE), 7, np.uint8), None]
    moved = replace(one.rendered.llm, slots=(PlacedSlot(1, Slot(1, 2)),))
    batch = collate([Example(replace(one.rendered, streams={"llm": moved}, media=(1,)), given(shown))], PLANS)
    assert (
        batch.media.inputs["vision"].values.shape == (1, 3, *SIZE) and (batch.media.inputs["vision"].values == 7).all()
    )
    assert batch.media.slot_counts == (2,) and batch.text["llm"].slots.feature_index is None


def test_every_encoder_is_given_views_of_its_own():
    """Of its own size and number, or flat patches; the items are the same."""
    one, text = item(stream(6, 1, ((1, 2), (3, 1)))), item(stream(3, 1), "b")
    flat = [Views(np.full((4 + n, 12), n, np.uint8), (Grid3(1, 1, 4 + n),)) for n in range(2)]
    both = {**one.views, "native": flat}
    native = SimpleNamespace(blank=lambda: Views(np.zeros((1, 12), np.uint8), (Grid3(1, 1, 1),)))
    plans = PLANS | {"native": native}
    media = collate([replace(one, views=both), replace(text, views={"vision": [], "native": []})], plans).media
    vision, patches = media.inputs["vision"], media.inputs["native"]
    assert vision.view_counts == (1, 2) and vision.values.shape == (3, 3, *SIZE)
    assert patches.view_counts == (1, 1) and patches.grids == ((1, 1, 4), (1, 1, 5)) and patches.is_flat
    assert patches.values[:, 0].tolist() == [0] * 4 + [1] * 5
    assert media.slot_counts == (2, 1) and media.row.tolist() == [0, 0]
    blank = collate([text], plans).media.inputs
    assert [one.views_total for one in blank.values()] == [0, 0] and len(blank["native"]) == 1


def test_a_placeholder_that_nothing_fills_is_refused():
    one = item(stream(6, 1, ((1, 3),)), "bad")
    with pytest.raises(BatchError, match=r"sample 'bad', stream 'llm': the text has 3 placeholders, .* 2 are"):
        collate([replace(one, rendered=_with_slot(one, PlacedSlot(1, Slot(0, 2))))], PLANS)
    with pytest.raises(BatchError, match=r"sample 'bad', stream 'llm': the text has 3 placeholders, .* 3 are"):
        collate([replace(one, rendered=_with_slot(one, PlacedSlot(2, Slot(0, 3))))], PLANS)
    with pytest.raises(BatchError, match=r"sample 'bad': media item 0 has 3 placeholders, but 0 views"):
        collate([replace(one, views={"vision": []})], PLANS)


def _with_slot(one: Example, placed: PlacedSlot) -> TokenizedSample:
    return replace(one.rendered, streams={"llm": replace(one.rendered.llm, slots=(placed,))})


def test_samples_with_other_streams_are_refused():
    with pytest.raises(BatchError, match=r"sample 'b' has the streams llm, but 'a' has llm, rejected"):
        collate([item(stream(3, 1), rejected=stream(3, 1)), item(stream(3, 1), "b")], PLANS)


@pytest.mark.parametrize(
    ("change", "left", "plain"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"attention_group": np.array([0, 0, 1, 1, 2], np.int32)}, False, False),
        ({"positions": np.array([[0, 1, 2, 2, 3]])}, False, True),
        ({"positions": np.arange(15).reshape(3, 5)}, False, True),
    ],
)
def test_plain_causal_means_that_no_mask_is_needed(change, left, plain):
    calm = [replace(stream(n, 1), attention_group=np.zeros(n, np.int32)) for n in (5, 3)]
    batch = collate([item(replace(calm[0], **change)), item(calm[1])], PLANS, left=left)
    assert batch.text["llm"].plain_causal is plain


def test_three_position_axes():
    three = np.array([[0, 1, 1, 2], [0, 1, 2, 3], [0, 1, 1, 3]])
    text = collate([item(replace(stream(4, 1), positions=three)), item(stream(2, 1))], PLANS).text["llm"]
    assert text.positions[:, 0].tolist() == three.tolist()
    assert text.positions[:, 1].tolist() == [[0, 1, 0, 0]] * 3  # a text counts alike on all axes


def test_supervised_is_where_the_labels_are():
    text = collate(ITEMS, PLANS).text["llm"]
    assert torch.equal(text.supervised, torch.nonzero(text.labels.reshape(-1) != IGNORE).reshape(-1))
    assert len(text.supervised) == 6


@pytest.mark.parametrize(
    ("rule", "each"),
    [("token", 2.0), ("source", 2.0), ("sample", 2.0 / 4), ("sqrt_length", 2.0 / 4**0.5)],
)
def test_normalization_rules(rule, each):
    text = collate([item(stream(7, 4), weight=2.0)], PLANS, normalize=rule).text["llm"]
    torch.testing.assert_close(text.weights[0], torch.tensor([0.0] * 3 + [each] * 4))


def test_each_sample_weighs_the_same_whatever_its_length_and_target_weights():
    items = [item(stream(9, 7, weight=0.5)), item(stream(3, 1)), item(stream(3, 0))]
    weights = collate(items, PLANS, normalize="sample").text["llm"].weights.sum(1)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.0]))


def test_an_empty_list_gives_one_padding_row():
    batch = collate([], PLANS, streams=("llm", "rejected"))
    assert list(batch.text) == ["llm", "rejected"]
    text = batch.text["llm"]
    assert text.ids.tolist() == [[0]] and text.labels.tolist() == [[IGNORE]] and text.segment_ids.tolist() == [[0]]
    assert text.weights.sum() == 0 and text.supervised.tolist() == []
    assert batch.media.inputs["vision"].values.shape == (1, 3, *SIZE) and batch.media.inputs["vision"].views_total == 0
    assert text.slots.index.tolist() == [] and batch.media.row.tolist() == []
    assert text.supervised.dtype == text.slots.index.dtype == batch.media.row.dtype == torch.int64
    assert batch.keys == batch.sources == ((),)


def test_prompts_are_padded_on_the_left():
    text = collate_prompts([(one.rendered, one.views) for one in ITEMS], PLANS).text["llm"]
    assert (text.segment_ids[:, -1] == 1).all() and text.segment_ids[1].tolist() == [0] * 5 + [1] * 4


def plain(length: int, learned: int, slots: tuple[tuple[int, int], ...] = ()) -> Stream:
    return replace(stream(length, learned, slots), attention_group=np.zeros(length, np.int32))


def test_a_packed_row_holds_its_samples_as_segments():
    one, two, three = item(plain(9, 2, ((1, 3),))), item(plain(4, 1), "b"), item(plain(5, 1, ((0, 2), (3, 1))), "c")
    batch = collate_rows([[one, two], [three]], PLANS)
    text = batch.text["llm"]
    assert text.ids.shape == (2, 13) and batch.keys == (("a", "b"), ("c",)) and batch.sources == (("s", "s"), ("s",))
    assert text.segment_ids.tolist() == [[1] * 9 + [2] * 4, [1] * 5 + [0] * 8]
    assert text.positions[0].tolist() == [[*range(9), *range(4)], [*range(5), *[0] * 8]]
    for row, start, of in ((0, 0, one), (0, 9, two), (1, 0, three)):
        stretch = slice(start, start + len(of.rendered.llm))
        for name in ("ids", "labels", "weights"):
            assert np.array_equal(getattr(text, name)[row, stretch], getattr(of.rendered.llm, name)), name
    assert not text.plain_causal and text.masked is None and text.sample_lengths == ((9, 4), (5,))
    assert text.causal.lengths == (9, 4, 5, 8) and text.causal.max_length == 9 and text.causal.index is None
    assert text.causal.cu_seqlens.tolist() == [0, 9, 13, 18, 26]
    assert text.slots.index.tolist() == [1, 2, 3, 13, 14, 16] and text.slots.feature_index is None
    assert batch.media.row.tolist() == [0, 1, 1] and batch.media.slot_counts == (3, 2, 1)
    assert batch.media.inputs["vision"].view_counts == (1, 1, 2) and batch.media.keys == ("a", "c", "c")


def test_samples_with_attention_groups_are_apart_from_causal_ones():
    branched = item(stream(6, 1))
    text = collate_rows([[item(plain(3, 1)), branched], [item(plain(5, 1))]], PLANS).text["llm"]
    assert not text.plain_causal
    assert text.causal.lengths == (3, 5, 4) and text.causal.index.tolist() == [*range(3), *range(9, 18)]
    assert text.masked.lengths == (6,) and text.masked.index.tolist() == [*range(3, 9)]
    alone = collate_rows([[branched]], PLANS).text["llm"]
    assert alone.causal is None and alone.masked.lengths == (6,) and alone.masked.index is None


def test_sequences_of_rows_that_are_plain_padded_on_the_left_or_empty():
    single = collate_rows([[item(plain(3, 1))], [item(plain(5, 1))]], PLANS).text["llm"]
    assert single.plain_causal and single.causal.lengths == (3, 2, 5)
    left = collate_rows([[item(plain(3, 1))], [item(plain(5, 1))]], PLANS, left=True).text["llm"]
    assert not left.plain_causal and left.causal.lengths == (2, 3, 5)
    none = collate_rows([], PLANS).text["llm"]
    assert none.causal.lengths == (1,) and none.sample_lengths == ()


@pytest.mark.parametrize("positions", [np.array([[0, 1, 2, 2, 3]]), np.arange(15).reshape(3, 5)])
def test_positions_say_nothing_about_sequences(positions):
    moved = item(replace(plain(5, 1), positions=positions))
    assert collate_rows([[moved], [item(plain(3, 1))]], PLANS).text["llm"].plain_causal
    packed = collate_rows([[moved, item(plain(3, 1))]], PLANS).text["llm"]
    assert packed.causal.lengths == (5, 3) and packed.masked is None and len(packed.positions) == len(positions)


@pytest.mark.parametrize("left", [False, True])
def test_a_token_knows_the_last_item_before_it(left):
    """In its own sample, of packed rows too; with placeholders or without."""
    one = replace(stream(6, 1, ((1, 2), (4, 0))), attention_group=np.zeros(6, np.int32))
    two = replace(stream(3, 1), attention_group=np.zeros(3, np.int32))
    three = replace(stream(2, 1, ((0, 1),)), attention_group=np.zeros(2, np.int32))
    batch = collate_rows([[item(one), item(two, "b")], [item(three, "c")]], PLANS, left=left)
    row = [2, 2]
    expected = [[-1, 0, 0, 0, 1, 1, -1, -1, -1], [-1] * 7 + row if left else row + [-1] * 7]
    assert batch.text["llm"].media_of_token.tolist() == expected
    assert collate_rows([], PLANS).text["llm"].media_of_token.tolist() == [[-1]]


def test_a_token_knows_no_item_of_another_branch():
    groups = np.array([0, 0, 1, 1, 1, 2, 2], np.int32)  # the second item is private to the first branch
    branched = replace(stream(7, 1, ((1, 0), (3, 0))), attention_group=groups)
    assert collate([item(branched)], PLANS).text["llm"].media_of_token.tolist() == [[-1, 0, 0, 1, 1, 0, 0]]
