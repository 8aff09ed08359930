"""easy-VQA and LLaVA JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image, ImageColor

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text, Turn
from data_pipelines.sources.easy_vqa import EasyVQA, Question, describe_thing, make_caption
from data_pipelines.sources.llava_json import LlavaJSON
from data_pipelines.sources.tiny import Tiny

RGB = {
    "black": 0x000000,
    "blue": 0x0000FF,
    "brown": 0xA52A2A,
    "gray": 0x808080,
    "green": 0x00FF00,
    "red": 0xFF0000,
    "teal": 0x008080,
    "yellow": 0xFFFF00,
}


def _count(split):
    samples = [sample for sample, _ in EasyVQA(split=split)]
    return len(samples), sum(len(sample.annotations) for sample in samples), {sample.key for sample in samples}


def test_easy_vqa_splits_are_complete_and_disjoint():
    train, val, both, test = (_count(split) for split in ("train", "val", "trainval", "test"))
    assert (train[0], val[0], both[0], test[0]) == (3800, 200, 4000, 1000)
    assert train[1] + val[1] == both[1] == 38575 and test[1] == 9673
    assert not train[2] & val[2] and train[2] | val[2] == both[2] and not both[2] & test[2]
    assert sorted(val[2])[:3] == ["train-00013", "train-00035", "train-00064"]  # held out for ever


def test_easy_vqa_sample():
    sample, blobs = next(iter(EasyVQA(split="test")))
    texts, answers, images = easy_vqa.get_test_questions()
    pairs = [(text, answer) for text, answer, image in zip(texts, answers, images, strict=True) if image == 0]
    assert sample.key == "test-00000" and (sample.source, sample.license) == ("easy_vqa", "MIT")
    assert [tuple(turn.text for turn in annotation.turns) for annotation in sample.annotations] == pairs
    assert all(annotation.turns[0].parts[0] == Media(item=0) for annotation in sample.annotations)
    assert blobs == [Path(easy_vqa.get_test_image_paths()[0]).read_bytes()] and sample.media[0].width == 64


def test_easy_vqa_without_images_keeps_the_text():
    plain, blobs = next(iter(EasyVQA(split="val", images=False)))
    full, _ = next(iter(EasyVQA(split="val")))
    assert plain.media == () and blobs == [] and plain.key == full.key
    texts = [[turn.text for annotation in sample.annotations for turn in annotation.turns] for sample in (plain, full)]
    assert texts[0] == texts[1]


def test_easy_vqa_captions_agree_with_the_pixels():
    """Of its bounding box's corners, a rectangle fills four, a triangle (on its base) two, a circle none."""
    corners = {4: "rectangle", 2: "triangle", 0: "circle"}
    words: Counter[tuple[int, bool]] = Counter()
    for sample, (blob,) in EasyVQA(split="trainval", captions=True):
        color, shape = sample.meta["color"], sample.meta["shape"]
        shown, turn = sample.annotations[0].turns
        assert shown == Turn(role="user", parts=(Media(item=0),)), "a place for models that read it as text"
        assert turn.role == "assistant" and turn.parts == (Text(text=make_caption(color, shape)),)
        words[len(turn.text.split()), shape is None] += 1
        pixels = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) @ (65536, 256, 1)
        values, counts = np.unique(pixels, return_counts=True)
        value = values[np.argsort(counts)[-2]]  # the commonest is the background
        if color:
            assert value == RGB[color], sample.key
        if shape:
            inside = pixels == value
            rows, columns = np.flatnonzero(inside.any(1))[[0, -1]], np.flatnonzero(inside.any(0))[[0, -1]]
            assert shape == corners[int(inside[np.ix_(rows, columns)].sum())], sample.key
    assert words == {(3, False): 3578, (3, True): 134, (2, False): 259}


def test_easy_vqa_gives_some_images_the_caption_of_another() -> None:
    own, noisy = EasyVQA(split="test", captions=True), EasyVQA(split="test", captions=True, wrong=0.3)
    pairs = [(a.annotations[0].turns[1].text, b) for (a, _), (b, _) in zip(own, noisy, strict=True)]
    assert all((text == sample.annotations[0].turns[1].text) == sample.meta["right"] for text, sample in pairs)
    share = sum(not sample.meta["right"] for _, sample in pairs) / len(pairs)
    assert 0.27 < share < 0.33
    assert "right" not in own.read_record(0)[0].meta
    with pytest.raises(DataError, match="wrong: got 0.3; allowed: .* with captions=true"):
        EasyVQA(split="test", wrong=0.3)


def test_describe_uses_negations_and_elimination():
    assert describe_thing([Question("is there not a red shape?", "no")]) == ("red", None)
    assert describe_thing([Question("is no circle present?", "yes"), Question("is a triangle present?", "no")]) == (
        None,
        "rectangle",
    )
    assert describe_thing([Question("what color is the circle?", "teal")]) == ("teal", "circle")
    assert describe_thing([Question("what is the blue shape?", "triangle")]) == ("blue", "triangle")
    assert describe_thing([Question("what shape is present?", "circle")]) == (None, "circle")
    assert [
        make_caption("teal", "circle"),
        make_caption("teal", None),
        make_caption(None, "circle"),
        make_caption(None, None),
    ] == [
        "a teal circle",
        "a teal shape",
        "a circle",
        "",
    ]


def test_easy_vqa_refuses_unknown_split():
    with pytest.raises(DataError, match=r"split: got 'dev'; allowed: train, val, trainval, test"):
        EasyVQA(split="dev")


def _talk(*values):
    names = ("human", "gpt")
    return [{"from": names[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.fixture
def llava(tmp_path, picture):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    (tmp_path / "images" / "coco" / "1.jpg").write_bytes(picture(1, "JPEG"))
    (tmp_path / "images" / "coco" / "2.jpg").write_bytes(picture(2, "PNG"))  # a PNG named .jpg

    def read(records, **options):
        (tmp_path / "records.json").write_text(json.dumps(records))
        return list(LlavaJSON(file=str(tmp_path / "records.json"), images=str(tmp_path / "images"), **options))

    return read


def test_llava_pretrain_format(llava):
    conversations = _talk("Give a brief description.\n<image>", "a cat")
    record = {"id": "004", "image": "coco/1.jpg", "conversations": conversations}
    ((sample, blobs),) = llava([record])
    assert sample.key == "0000000-004" and sample.media[0].name == "0.jpg" and len(blobs) == 1
    human, gpt = sample.annotations[0].turns
    assert human.parts == (Media(item=0), Text(text="Give a brief description."))
    assert (gpt.role, gpt.text) == ("assistant", "a cat")
    ((in_place, _),) = llava([record], image_first=False)
    assert in_place.annotations[0].turns[0].parts == (Text(text="Give a brief description."), Media(item=0))


def test_llava_mix_format(llava):
    records = [
        {"id": "1", "image": "coco/2.jpg", "conversations": _talk("<image>\nWhat?", "x", "And?", "y")},
        {"id": "1", "model": "", "conversations": _talk("Write SVG.", "<svg><image></svg>")},
        {"id": "t", "conversations": [{"from": "gpt", "value": "left over"}, *_talk("Hi", "Hello")]},
        {"id": 7, "image": ["coco/1.jpg", "coco/2.jpg"], "conversations": _talk("<image>\n<image>\nCompare.", "z")},
    ]
    (mixed, _), (text, _), (cut, _), (two, blobs) = llava(records)
    assert [turn.role for turn in mixed.annotations[0].turns] == ["user", "assistant"] * 2
    assert mixed.annotations[0].turns[0].parts == (Media(item=0), Text(text="What?"))
    assert mixed.media[0].name == "0.png" and mixed.key != text.key
    assert text.media == () and text.annotations[0].turns[1].text == "<svg><image></svg>"
    assert [turn.text for turn in cut.annotations[0].turns] == ["Hi", "Hello"]
    assert two.annotations[0].turns[0].parts == (Media(item=0), Media(item=1), Text(text="Compare."))
    assert len(blobs) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "coco/1.jpg", "conversations": _talk("What?", "x")}, "record 'r': 0 <image> tags .* 1 images"),
        ({"conversations": _talk("<image>\nWhat?", "x")}, "record 'r': 1 <image> tags .* 0 images"),
        ({"image": "coco/9.jpg", "conversations": _talk("<image>", "x")}, "record 'r': .*9.jpg: No such file"),
        ({"image": "../records.json", "conversations": _talk("<image>", "x")}, "leaves the folder"),
        ({"image": "/etc/passwd", "conversations": _talk("<image>", "x")}, "leaves the folder"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn of 'bot'; allowed: human, user, gpt, assistant"),
        ({"conversations": []}, "no turns"),
        ({"conversation": []}, "malformed: KeyError: 'conversations'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn of 'human' holds None, not text"),
    ],
)
def test_unusable_llava_records_stand_in_their_place(llava, record, reason):
    good = {"id": "ok", "conversations": _talk("Hi", "Hello")}
    bad, (sample, _) = llava([{"id": "r", **record}, good])
    assert isinstance(bad, BadSample) and sample.key == "0000001-ok"
    with pytest.raises(BadSample, match=reason):
        raise bad


def test_llava_files_are_checked_first(tmp_path):
    with pytest.raises(DataError, match="file: .*none.json: No such file"):
        LlavaJSON(file=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="images: no such folder"):
        LlavaJSON(file="x", images=str(tmp_path / "none"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list of records"):
        LlavaJSON(file=str(tmp_path / "x.json"))


def test_tiny_is_the_same_every_time_and_differs_between_splits():
    first, again, more = list(Tiny(count=6)), list(Tiny(count=6)), list(Tiny(count=8))
    assert first == again == more[:6] and len(Tiny(count=8)) == len(more) == 8
    assert [blobs for _, blobs in Tiny(split="val", count=6)] != [blobs for _, blobs in first]


def test_tiny_answers_agree_with_the_pixels():
    for sample, (blob,) in Tiny(count=20):
        color, shape = sample.meta["color"], sample.meta["shape"]
        assert [annotation.turns[1].text for annotation in sample.annotations] == [f"a {color} {shape}", color]
        image = Image.open(io.BytesIO(blob))
        assert image.size == (sample.media[0].width, sample.media[0].height)
        seen = {count_and_value[1] for count_and_value in image.getcolors()}
        assert seen == {(255, 255, 255), ImageColor.getrgb(color)}


def test_tiny_refuses_what_it_does_not_know():
    with pytest.raises(DataError, match="split: got 'dev'; allowed: train, val, test"):
        Tiny(split="dev")
    with pytest.raises(DataError, match="count: got 0; allowed: 1 or more"):
        Tiny(count=0)
