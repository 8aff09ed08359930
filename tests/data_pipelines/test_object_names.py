"""Names of objects in texts, by hand."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import DataError
from data_pipelines.object_names import ObjectNames


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A DOG, two dogs and a puppy.", ["dog", "dog", "dog"]),
        ("hot dogs; a hot\nplate", ["hot dog"]),
        ("Three buses, one bus", ["bus", "bus"]),
        ("berries, a berry and glass", ["berry", "berry", "wine glass"]),
        ("doghouse, hotdog", []),
        ("", []),
    ],
)
def test_mentions(text, expected):
    names = ObjectNames({"dog": ["puppy"], "hot dog": [], "bus": [], "berry": (), "wine glass": ["glass", "glasses"]})
    assert names.find_mentions(text) == expected


def test_a_file_and_what_is_none(tmp_path):
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"cat": ["kitten"]}))
    assert ObjectNames(str(path)).find_mentions("Kittens!") == ["cat"]
    for wrong, message in (
        ({}, "expected"),
        ({"cat": "kitten"}, "cat: got 'kitten'; expected a list"),
        ({"cat": [" - "]}, "cat: the name ' - ' has no word"),
        ({"cat": [], "dog": ["cats"]}, "'cats' names both 'cat' and 'dog'"),
        (str(tmp_path / "none.json"), "none.json"),
    ):
        with pytest.raises(DataError, match=message):
            ObjectNames(wrong)
