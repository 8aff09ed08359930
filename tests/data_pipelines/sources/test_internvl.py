"""InternVL's meta file and records: several data sets, repetition, images with and without tags, videos."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.internvl import InternVL
from tests.support.videos import video


def talk(ask):
    return [{"from": "human", "value": ask}, {"from": "gpt", "value": "yes"}]


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / "data" / "coco" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "data" / "coco" / "v.mp4").write_bytes(video(2))
    records = {
        "one": [
            {"id": 0, "image": "1.png", "width": 12, "height": 8, "conversations": talk("<image>\nA cat?")},
            {"id": 1, "image": "2.png", "width": 12, "height": 8, "conversations": talk("A dog?")},
        ],
        "more": [
            {"id": 0, "image": ["1.png", "2.png"], "width_list": [12, 12], "conversations": talk("<image>or<image>?")},
            {"id": 1, "image": ["1.png", "2.png"], "conversations": talk("Both?")},
            {"id": 2, "video": "v.mp4", "conversations": talk("<video>\nDark?")},
            {"id": 3, "conversations": talk("Hi")},
        ],
    }
    for name, rows in records.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def entry(name, **changes):
    return {
        "root": "data/coco/",
        "annotation": f"data/{name}.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 2,
    } | changes


def read(folder, sets, **options):
    (folder / "meta.json").write_text(json.dumps(sets))
    return InternVL(meta=str(folder / "meta.json"), folder=str(folder), **options)


def test_records_of_every_kind(folder):
    samples = [record[0] for record in read(folder, {"coco": entry("one"), "mix": entry("more")})]
    assert [sample.source for sample in samples] == ["coco"] * 2 + ["mix"] * 4
    asked = [sample.annotations[0].turns[0].parts for sample in samples]
    one, two = Media(item=0), Media(item=1)
    assert asked[:2] == [(one, Text(text="A cat?")), (one, Text(text="A dog?"))]
    assert asked[2:4] == [(one, Text(text="or"), two, Text(text="?")), (one, two, Text(text="Both?"))]
    assert asked[4:] == [(one, Text(text="Dark?")), (Text(text="Hi"),)]
    assert samples[4].media[0].kind == "video" and samples[5].media == ()
    assert len({sample.key for sample in samples}) == 6


def test_repetition_and_choice(folder):
    sets = {"twice": entry("one", repeat_time=2), "half": entry("more", repeat_time=0.5)}
    made = read(folder, sets)
    assert [sample.meta["id"] for sample, _ in made] == [0, 1, 0, 1, 0, 1] and len(made) == 6
    assert len({sample.key for sample, _ in made}) == 6
    assert len(read(folder, sets, repeat=False)) == 6 and len(read(folder, sets, limit=3)) == 3
    assert [sample.source for sample, _ in read(folder, sets, names=["half"])] == ["half"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat_time": 1.5}, "meta: a: repeat_time 1.5; allowed: above 0, and whole above 1"),
        ({"repeat_time": 0}, "repeat_time 0"),
        ({"annotation": "../x.jsonl"}, "leaves the folder"),
        ({"root": "/etc"}, "leaves the folder"),
        ({"root": "data/none"}, "meta: a: root: no such folder"),
        ({"annotation": "data/x.json"}, "allowed: .jsonl"),
        ({"annotation": None}, "meta: a: malformed: TypeError"),
    ],
)
def test_wrong_entries(folder, changes, message):
    with pytest.raises(DataError, match=message):
        read(folder, {"a": entry("one", **changes)})


def test_wrong_meta_files(folder):
    with pytest.raises(DataError, match="names: x not in .*meta.json; allowed: coco"):
        read(folder, {"coco": entry("one")}, names=["x"])
    with pytest.raises(DataError, match="expected an object of data sets"):
        read(folder, [])
    with pytest.raises(DataError, match="meta: none.json"):
        InternVL(meta="none.json")


def test_untagged_images_come_before_untagged_videos(folder):
    row = {"image": "1.png", "video": "v.mp4", "conversations": talk("Both?")}
    (folder / "data" / "both.jsonl").write_text(json.dumps(row))
    ((sample, _),) = read(folder, {"a": entry("both")})
    assert [item.kind for item in sample.media] == ["image", "video"]
    assert sample.annotations[0].turns[0].parts == (Media(item=0), Media(item=1), Text(text="Both?"))


def test_unusable_records_name_their_set(folder):
    rows = [{"image": "1.png", "conversations": talk("<image><image>")}, {"image": "../one.jsonl"}]
    (folder / "data" / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    bad = list(read(folder, {"a": entry("bad")}))
    reasons = ["a, line 1: 2 <image> tags .* 1 files", "a, line 2: .*leaves the folder", "a, line 3: not JSON"]
    for error, reason in zip(bad, reasons, strict=True):
        with pytest.raises(BadSample, match=reason):
            raise error
