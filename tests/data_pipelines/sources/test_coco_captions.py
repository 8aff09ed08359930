"""COCO captions: official files and the Karpathy split."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.coco_captions import CocoCaptions, KarpathyCaptions


@pytest.fixture
def coco(tmp_path, picture):
    for number, folder in enumerate(("train2014", "val2014", "val2014", "val2014"), start=1):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"COCO_{folder}_{number:012d}.jpg").write_bytes(picture(number, "JPEG"))
    return tmp_path


def _official(root, images, annotations):
    data = {"info": {"year": 2014}, "licenses": [{"id": 1}], "images": images, "annotations": annotations}
    (root / "captions.json").write_text(json.dumps(data))
    return {"file": str(root / "captions.json"), "images": str(root / "val2014")}


def _image(number):
    return {"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg", "width": 12, "height": 8, "license": 1}


def _karpathy(root):
    splits = ["train", "restval", "val", "test"]
    images = [
        {
            "filepath": "val2014" if split != "train" else "train2014",
            "filename": f"COCO_{'val2014' if split != 'train' else 'train2014'}_{number:012d}.jpg",
            "imgid": number - 1,
            "cocoid": number,
            "split": split,
            "sentids": [2 * number, 2 * number + 1],
            "sentences": [
                {"tokens": ["a", split], "raw": f"A {split}.", "imgid": number - 1, "sentid": 2 * number},
                {"tokens": ["two"], "raw": "Two. ", "imgid": number - 1, "sentid": 2 * number + 1},
            ],
        }
        for number, split in enumerate(splits, start=1)
    ]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return {"file": str(root / "dataset_coco.json"), "images": str(root)}


def _texts(source):
    return {sample.key: [annotation.turns[1].text for annotation in sample.annotations] for sample, _ in source}


def test_captions_of_an_image_are_independent_annotations(coco, picture):
    rows = [(3, "Three here.\n"), (2, "Two."), (3, " Again three."), (4, " ")]
    annotations = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(rows)]
    options = _official(coco, [_image(number) for number in (3, 2, 4, 9)], annotations)
    (three, blobs), (two, _), *bad = CocoCaptions(**options)
    assert three.key == "000000000003" and blobs == [picture(3, "JPEG")] and three.media[0].name == "0.jpg"
    assert [annotation.turns[0].parts for annotation in three.annotations] == [(Media(item=0),)] * 2
    assert [annotation.turns[1].parts for annotation in three.annotations] == [
        (Text(text="Three here."),),
        (Text(text="Again three."),),
    ]
    assert two.key == "000000000002" and two.meta["images"] == ["COCO_val2014_000000000002.jpg"]
    assert all(isinstance(error, BadSample) for error in bad)
    assert [str(error) for error in bad] == [f"image 'COCO_val2014_{n:012d}.jpg': has no caption" for n in (4, 9)]
    assert [len(sample.annotations) for sample, _ in list(CocoCaptions(captions="first", **options))[:2]] == [1, 1]


def test_karpathy_restval_joins_train(coco):
    options = _karpathy(coco)
    train = {"000000000001": ["A train.", "Two."], "000000000002": ["A restval.", "Two."]}
    assert _texts(KarpathyCaptions(**options)) == train
    assert list(_texts(KarpathyCaptions(restval=False, **options))) == ["000000000001"]
    assert _texts(KarpathyCaptions(split="val", captions="first", **options)) == {"000000000003": ["A val."]}
    assert list(_texts(KarpathyCaptions(split="test", **options))) == ["000000000004"]


def test_karpathy_files_of_flickr_have_no_folder(tmp_path, picture):
    (tmp_path / "7.jpg").write_bytes(picture(7, "JPEG"))
    image = {"filename": "7.jpg", "imgid": 0, "split": "train", "sentids": [0], "sentences": [{"raw": "Seven."}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [image], "dataset": "flickr30k"}))
    source = KarpathyCaptions(file=str(tmp_path / "dataset_flickr30k.json"), images=str(tmp_path))
    assert _texts(source) == {"000000000000": ["Seven."]}


def test_wrong_files_and_options_are_refused(coco):
    official = _official(coco, [_image(2)], [{"image_id": 5, "id": 0, "caption": "Lost."}])
    with pytest.raises(DataError, match="not laid out as the official captions: KeyError: 5"):
        CocoCaptions(**official)
    with pytest.raises(DataError, match="not laid out as a Karpathy split: KeyError: 'split'"):
        KarpathyCaptions(**official)
    with pytest.raises(DataError, match="split: got 'restval'; allowed: train, val, test"):
        KarpathyCaptions(split="restval", **_karpathy(coco))
    with pytest.raises(DataError, match="captions: got 'five'; allowed: all, first"):
        KarpathyCaptions(captions="five", **_karpathy(coco))


@pytest.mark.parametrize("null", [None, float("nan"), 7])
def test_what_is_no_text_is_no_caption(coco, null):
    annotations = [{"image_id": 2, "id": 0, "caption": null}, {"image_id": 2, "id": 1, "caption": "A cat."}]
    ((sample, _),) = list(CocoCaptions(**_official(coco, [_image(2)], annotations)))
    assert [one.turns[1].text for one in sample.annotations] == ["A cat."]
    assert sample.meta["skipped"] == ["empty caption"]
    (bad,) = list(CocoCaptions(**_official(coco, [_image(2)], annotations[:1])))
    assert isinstance(bad, BadSample) and str(bad).endswith("has no caption")
