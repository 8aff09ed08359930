"""Preference pairs: RLHF-V's parquet, pairs of one's own, weights of the changed words."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.preference import RLHFV, PreferencePairs, find_changed_spans

PAIR = {"question": "What is it?", "chosen": "A red cat, asleep.", "rejected": "A blue dog, asleep."}


def rlhf_v(tmp_path, picture, text):
    row = {
        "ds_name": "RLHF-V",
        "image": {"bytes": picture(1, "JPEG"), "path": "1.jpg"},
        "text": text,
        "origin_dataset": "VQAv2",
        "origin_split": '{"model": "muffin", "type": "question answering"}',
        "idx": 17,
        "image_path": "images/1.jpg",
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "RLHF-V-Dataset.parquet")
    return str(tmp_path / "RLHF-V-Dataset.parquet")


def test_rlhf_v_parquet(tmp_path, picture):
    file = rlhf_v(tmp_path, picture, json.dumps(PAIR))
    ((sample, blobs),) = RLHFV(file=file)
    assert blobs == [picture(1, "JPEG")] and sample.key == "0000000-17" and sample.meta["origin_dataset"] == "VQAv2"
    (annotation,) = sample.annotations
    ask, chosen = annotation.turns
    assert ask.parts == (Media(item=0), Text(text="What is it?"))
    assert chosen.parts == (Text(text="A red cat, asleep.", weights=((2, 9, 5.0),)),)
    assert annotation.rejected.parts == (Text(text="A blue dog, asleep.", weights=((2, 10, 5.0),)),)
    ((plain, _),) = PreferencePairs(file=file)
    assert plain.annotations[0].turns[1].parts == (Text(text="A red cat, asleep."),)


def test_changed_words():
    assert find_changed_spans("a b c", "a c") == ([(2, 3)], []) and find_changed_spans("a", "b") == ([(0, 1)], [(0, 1)])
    assert find_changed_spans("One cat. Two.", "One cat, two!") == ([(7, 13)], [(7, 13)])


def test_pairs_of_ones_own(tmp_path, picture):
    (tmp_path / "1.png").write_bytes(picture())
    rows = [{"image": "1.png", **PAIR}, PAIR]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{broken\n")
    shown, unseen, broken = PreferencePairs(file=str(tmp_path / "pairs.jsonl"), images=str(tmp_path))
    assert shown[0].media[0].name == "0.png" and shown[0].annotations[0].rejected.text == PAIR["rejected"]
    assert unseen[0].media == () and unseen[0].annotations[0].turns[0].parts == (Text(text="What is it?"),)
    with pytest.raises(BadSample, match="line 4: not JSON"):
        raise broken
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", *PAIR])
        writer.writeheader()
        writer.writerows(rows)  # an image that is not there is an empty field
    assert [record[1] for record in PreferencePairs(file=str(tmp_path / "pairs.csv"), images=str(tmp_path))] == [
        [picture()],
        [],
    ]


def test_tags_place_one_or_several_images(tmp_path, picture):
    """MMPR: `<image>` in the question, and lists of images."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [
        {**PAIR, "image": "0.png", "question": "<image>\nWhat is it?"},
        {**PAIR, "image": ["0.png", "1.png"], "question": "First: <image> Second: <image> Which?"},
        {**PAIR, "image": ["0.png"], "question": "<image> <image>?"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, wrong = PreferencePairs(file=str(tmp_path / "pairs.jsonl"), images=str(tmp_path), changed_weight=5)
    ask, chosen = one[0].annotations[0].turns
    assert ask.parts[0] == Media(item=0) and ask.text.strip() == "What is it?"
    assert chosen.parts == (Text(text="A red cat, asleep.", weights=((2, 9, 5.0),)),)
    parts = two[0].annotations[0].turns[0].parts
    assert [part.item for part in parts if isinstance(part, Media)] == [0, 1] and isinstance(parts[0], Text)
    assert two[1] == [picture(0), picture(1)] and two[0].annotations[0].rejected.text == PAIR["rejected"]
    with pytest.raises(BadSample, match="2 <image> tags in its user turns, 1 files"):
        raise wrong


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "image": "9.png"}, "9.png: No such file"),
        ({**PAIR, "image": "../x.png"}, "leaves the folder"),
        ({**PAIR, "rejected": PAIR["chosen"]}, "the chosen answer is the rejected one"),
        ({**PAIR, "chosen": " "}, "chosen is empty or no text"),
        ({"text": "{"}, "not JSON"),
        ({"image": None}, "malformed: TypeError"),
    ],
)
def test_unusable_pairs(tmp_path, row, reason):
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    (bad,) = PreferencePairs(file=str(tmp_path / "pairs.json"), images=str(tmp_path))
    with pytest.raises(BadSample, match=reason):
        raise bad


def test_weights_must_be_positive(tmp_path):
    with pytest.raises(DataError, match="changed_weight: got 0; allowed: above 0"):
        PreferencePairs(file="x.json", changed_weight=0)
