"""Qwen-VL's fine-tuning format: images, regions and boxes in the text."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample
from data_pipelines.sample import Box, Media, Text
from data_pipelines.sources.qwen_vl import QwenVL


@pytest.fixture
def qwen(tmp_path, picture):
    (tmp_path / "assets").mkdir()
    for number in (1, 2):
        (tmp_path / "assets" / f"{number}.jpeg").write_bytes(picture(number, "JPEG"))

    def read(*turns, **options):
        talk = [{"from": ("user", "assistant")[n % 2], "value": value} for n, value in enumerate(turns)]
        (tmp_path / "x.json").write_text(json.dumps([{"id": "identity_1", "conversations": talk}]))
        (one,) = QwenVL(file=str(tmp_path / "x.json"), images=str(tmp_path), **options)
        return one

    return read


def test_images_and_boxes_become_parts(qwen, tmp_path):
    ask = f"Picture 1: <img>{tmp_path}/assets/1.jpeg</img>\nPicture 2: <img>assets/2.jpeg</img>\nFrame <ref>it</ref>"
    box = "<ref>The shirt</ref><box>(588,499),(725,789)</box> and <box>(0,0),(1000,999)</box>"
    sample, blobs = qwen(ask, box)
    assert [item.name for item in sample.media] == ["0.jpg", "1.jpg"] and len(blobs) == 2
    user, assistant = sample.annotations[0].turns
    assert user.parts == (Media(item=0), Media(item=1), Text(text="Frame it"))
    assert assistant.parts == (
        Text(text="The shirt"),
        Box(item=1, xyxy=(0.588, 0.499, 0.725, 0.789)),
        Text(text=" and "),
        Box(item=1, xyxy=(0.0, 0.0, 1.0, 0.999)),
    )
    assert sample.key == "0000000-identity_1"


def test_regions_may_keep_their_tags(qwen):
    sample, _ = qwen("<img>assets/1.jpeg</img>Where?", "<ref>There</ref>", keep_refs=True)
    assert sample.annotations[0].turns[1].text == "<ref>There</ref>"


def test_text_alone_is_a_sample(qwen):
    sample, blobs = qwen("Hi", "Hello", "And?", "so")
    assert not blobs and [turn.role for turn in sample.annotations[0].turns] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["<img>assets/9.jpeg</img>", "x"], "record 'identity_1': .*9.jpeg: No such file"),
        (["<img>https://a.b/demo.jpeg</img>", "x"], "No such file"),
        (["<img>/etc/passwd</img>", "x"], "leaves the folder"),
        (["x", "<box>(1,2),(3,4)</box>"], "before any image"),
        (["<img>assets/1.jpeg</img>", "<box>(1,2)</box>"], r"box '\(1,2\)'; expected"),
        (["<img>assets/1.jpeg</img>", "<box>(5,2),(3,4)</box>"], "its corners must be ordered"),
        (["<img>assets/1.jpeg</img>", "<box>(5,2),(3000,4)</box>"], "from 0 to 1000"),
        (["x"], "no turn of the assistant"),
    ],
)
def test_unusable_records(qwen, turns, reason):
    with pytest.raises(BadSample, match=reason):
        raise qwen(*turns)
