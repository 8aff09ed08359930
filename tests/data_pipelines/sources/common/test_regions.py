"""Boxes in pixels become fractions."""

from __future__ import annotations

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Box, Media, Text
from data_pipelines.sources.common.regions import RegionTask, box_from_xywh

HALF = Box(item=0, xyxy=(0.0, 0.0, 0.5, 0.5))


def test_boxes_are_fractions_of_their_image():
    assert box_from_xywh([10, 5, 30.0, 20], 100, 50).xyxy == (0.1, 0.1, 0.4, 0.5)
    assert box_from_xywh([0, 0, 100, 50], 100, 50).xyxy == (0.0, 0.0, 1.0, 1.0)


def test_up_to_a_pixel_outside_is_cut_off():
    assert box_from_xywh([-1, -0.5, 102, 51.5], 100, 50).xyxy == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("xywh", "reason"),
    [
        ([-1.1, 0, 10, 10], "leaves the image of 100 x 50 pixels"),
        ([0, 0, 101.1, 10], "leaves the image"),
        ([0, 45, 10, 6.1], "leaves the image"),
        ([100, 0, 0.5, 10], "has no area"),
        ([-1, 0, 1, 10], "has no area"),
        ([0, 0, 0, 10], "has no area"),
        ([0, 0, 10, -3], "has no area"),
        ([0, 0, float("nan"), 10], "has no area"),
        ([0, 0, float("inf"), 10], "leaves the image"),
        ([10**400, 0, 1, 1], "expected x, y, w, h in pixels"),
        ([1, 2, 3], "expected x, y, w, h in pixels"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], "expected x, y, w, h in pixels"),
        (None, "expected x, y, w, h in pixels"),
    ],
)
def test_other_boxes_are_unusable(xywh, reason):
    with pytest.raises(BadSample, match=reason):
        box_from_xywh(xywh, 100, 50)


def test_both_directions():
    ((asked, note),) = RegionTask("grounding", "Where is {phrase}?", "{box}").make_annotation(7, " a cat ", HALF)
    assert asked.turns[0].parts == (Media(item=0), Text(text="Where is a cat?")) and note == {"region_id": 7}
    assert asked.turns[1].parts == (HALF,)
    ((told, _),) = RegionTask("referring", "{phrase}", "What is at {box}?").make_annotation(7, "a cat", HALF)
    assert told.turns[0].parts == (Media(item=0), Text(text="What is at "), HALF, Text(text="?"))
    assert told.turns[1].parts == (Text(text="a cat"),)


def test_mixed_draws_the_same_task_every_time_and_both_alike():
    task = RegionTask("mixed", "{phrase}", "{box}")

    def drawn():
        return [task.make_annotation(i, "x", HALF)[0][0].turns[1].text == "" for i in range(400)]

    assert drawn() == drawn() and 160 < sum(drawn()) < 240


def test_wrong_options_are_refused():
    with pytest.raises(DataError, match="task: got 'find'; allowed: grounding, referring, mixed"):
        RegionTask("find", "{phrase}", "{box}")
    with pytest.raises(DataError, match=r"referring_prompt: got '\{phrase\}'; its fields must be: \{box\}"):
        RegionTask("mixed", "{phrase}", "{phrase}")
