"""VQAv2 and OK-VQA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.vqa import VQA


def test_questions_of_an_image_are_annotations_of_one_sample(published):
    options = published("vqav2")
    (first, blobs), (second, _) = VQA(**options, license="CC-BY-4.0")
    assert (first.key, second.key) == ("train2014-000000458752", "train2014-000000262146")
    assert blobs == [(Path(options["images"]) / "COCO_train2014_000000458752.jpg").read_bytes()]
    assert (first.source, first.license, first.meta["image_id"]) == ("vqav2", "CC-BY-4.0", 458752)
    looking, hat = first.annotations
    assert looking.turns[0].parts == (Media(item=0), Text(text="What is this photo taken looking through?"))
    assert [one.turns[1].text for one in (looking, hat, *second.annotations)] == ["net", "yes", "white"]
    note = first.meta["annotations"][0]
    assert note["question_id"] == 458752000 and note["answers"][3:6] == ["netting", "net", "mesh"]
    assert all(len(note["answers"]) == 10 for note in first.meta["annotations"])


def test_all_answers_weigh_as_many_as_gave_them(published):
    (first, _), _ = VQA(**published("vqav2"), answers="all_weighted")
    answers = [(one.turns[1].text, one.weight) for one in first.annotations]
    assert answers == [("net", 0.7), ("netting", 0.2), ("mesh", 0.1), ("yes", 1.0)]
    assert [note["question_id"] for note in first.meta["annotations"]] == [458752000] * 3 + [458752001]


def test_okvqa_has_no_published_best_answer(published):
    ((sample, _),) = VQA(**published("okvqa"), name="okvqa")
    assert sample.annotations[0].turns[1].text == "pony tail" and sample.key == "val2014-000000051606"
    assert sample.source == "okvqa" and len(sample.meta["annotations"][0]["answers"]) == 10


def test_unusable_questions_are_left_out_and_named(published):
    options = published("vqav2")
    questions = json.loads(Path(options["questions"]).read_text())
    questions["questions"][2]["question_id"] = 1
    questions["questions"] += [{"question": "no image"}, {"image_id": 9, "question": "?", "question_id": 458752000}]
    Path(options["questions"]).write_text(json.dumps(questions))
    (first, _), _, without, missing = VQA(**options)
    assert len(first.annotations) == 1 and first.meta["skipped"] == ["1: malformed: KeyError: 1"]
    assert isinstance(without, BadSample) and "image None: malformed: KeyError: 'image_id'" in str(without)
    assert isinstance(missing, BadSample) and "COCO_train2014_000000000009.jpg: No such file" in str(missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "val"}, "split: got 'val'; .* holds data_subtype 'train2014'"),
        ({"answers": "best"}, "answers: got 'best'; allowed: majority, all_weighted"),
        ({"prompt": "Answer"}, "prompt: got 'Answer'; its fields must be: {question}"),
        ({"questions": "{annotations}"}, "questions: .*: not VQA questions"),
        ({"annotations": "{questions}"}, "annotations: .*; expected a list under 'annotations'"),
    ],
)
def test_wrong_options_are_refused(published, change, message):
    options = published("vqav2")
    with pytest.raises(DataError, match=message):
        VQA(**options | {k: v if k == "prompt" else v.format(**options) for k, v in change.items()})


def test_limit_takes_the_first_images(published):
    assert [sample.key for sample, _ in VQA(**published("vqav2"), limit=1)] == ["train2014-000000458752"]


def test_a_build_counts_the_questions_that_it_leaves_out(published, tmp_path):
    from data_pipelines.build import write_shards
    from data_pipelines.shards.manifest import Manifest

    options = published("vqav2")
    questions = json.loads(Path(options["questions"]).read_text())
    questions["questions"] += [dict(questions["questions"][0], question_id=n) for n in (1, 2, 3)]
    Path(options["questions"]).write_text(json.dumps(questions))
    write_shards(VQA(**options), tmp_path / "out", max_bad=0)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.skipped == {"malformed: KeyError: …": 3} and manifest.samples == 2 and not manifest.bad
