"""RefCOCO, as JSON refs and as MDETR exports."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources.refcoco import RefCOCO

IMAGE = "COCO_train2014_000000581857.jpg"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _mdetr(raw, boxes=1):
    about = {"width": 100, "height": 50, "file_name": IMAGE, "original_id": 581857, "dataset_name": "refcoco"}
    images = [{**about, "id": n, "caption": caption} for n, caption in enumerate(["lady in blue", "woman"])]
    shown = [{"image_id": n, "bbox": [10, 5, 30, 20], "tokens_positive": [[0, 4]], "id": n} for n in range(2)]
    return {
        "file": raw.json(
            "finetune_refcoco_train.json", {"images": images, "annotations": shown[:1] * boxes + shown[1:]}
        ),
        "images": raw.images(IMAGE),
    }


def test_refs_ground_their_expressions(published):
    ((sample, _),) = RefCOCO(**published("refcoco"), task="grounding")
    assert sample.key == "train-COCO_train2014_000000581857" and sample.meta["image"] == IMAGE
    asked = [one.turns[0].text.partition("describes: ")[2] for one in sample.annotations]
    assert asked == ["the lady with the blue shirt.", "lady with back to us.", "woman facing her."]
    boxes = [one.turns[1].parts[0].xyxy for one in sample.annotations]
    assert boxes[:2] == [(0.1, 0.1, 0.4, 0.5)] * 2 and boxes[2] == pytest.approx((0.6051, 0.0, 1.0, 1.0))
    assert boxes[2][2] == 1.0  # 100.01 pixels
    assert [note["region_id"] for note in sample.meta["annotations"]] == [0, 1, 20]


def test_refs_refer_to_their_boxes_and_have_splits(published):
    options = published("refcoco")
    ((sample, _),) = RefCOCO(**options, task="referring", split="testA")
    ask, answer = sample.annotations[0].turns
    assert ask.text == "Please provide a short description for this region: ." and answer.text == "woman in gray shirt"
    with pytest.raises(DataError, match="split: no record has split = 'val'; the file has: testA, train"):
        RefCOCO(**options, split="val")


def test_refs_may_stand_under_their_name(published, raw):
    options = published("refcoco")
    refs = json.loads(Path(options["file"]).read_text())
    under = RefCOCO(**options | {"file": raw.json("under.json", {"refs": refs})})
    assert list(under) == list(RefCOCO(**options))


def test_mdetr_expressions_of_an_image_are_one_sample(raw):
    ((sample, _),) = RefCOCO(**_mdetr(raw), task="grounding", name="refcoco+")
    assert [one.turns[1].parts[0].xyxy for one in sample.annotations] == [(0.1, 0.1, 0.4, 0.5)] * 2
    assert sample.source == "refcoco+" and sample.meta["annotations"] == [{"region_id": 0}, {"region_id": 1}]


def test_an_expression_with_several_boxes_is_left_out(raw):
    ((sample, _),) = RefCOCO(**_mdetr(raw, boxes=2))
    assert len(sample.annotations) == 1 and "expected x, y, w, h" in sample.meta["skipped"][0]


def test_a_pickle_is_refused_unread(published, tmp_path):
    trap, file = tmp_path / "sprung", tmp_path / "refs(unc).p"
    file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(DataError, match=r"refs\(unc\).p is a pickle, which runs code .* python -c"):
        RefCOCO(**published("refcoco") | {"file": str(file)})
    renamed = file.rename(tmp_path / "refs.json")
    with pytest.raises(DataError, match="file: .*refs.json is not JSON"):
        RefCOCO(**published("refcoco") | {"file": str(renamed)})
    assert not trap.exists()


def test_wrong_files_are_refused(published, raw):
    options = published("refcoco")
    with pytest.raises(DataError, match="holds refs, whose boxes are in another file: instances="):
        RefCOCO(**options | {"instances": None})
    for value in ({"x": 1}, [{"split": "train"}], 7, {"annotations": [], "images": [{}]}):
        with pytest.raises(DataError, match="file: .*: neither refs nor an MDETR file"):
            RefCOCO(**options | {"file": raw.json("x.json", value)})


def test_images_of_another_size_than_their_boxes_are_unusable(published, raw):
    options = published("refcoco")
    raw.images(IMAGE, size=(50, 25))
    (bad,) = RefCOCO(**options)
    assert isinstance(bad, BadSample) and "image of 50 x 25 pixels, its boxes are for 100 x 50" in str(bad)
