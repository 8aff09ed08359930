"""DocVQA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources.docvqa import DocVQA


def test_questions_of_a_page_are_annotations_of_one_sample(published):
    (first, _), (second, _) = DocVQA(**published("docvqa"))
    assert (first.key, second.key) == ("train-xnbl0037_1", "train-pybv0228_81")
    assert [one.turns[1].text for one in first.annotations] == ["1/8/93", "P. Carter"]
    assert first.annotations[0].turns[0].text == "what is the date mentioned in this letter?"
    assert first.meta["annotations"][0] == {
        "question_id": 337,
        "answers": ["1/8/93", "January 8, 1993"],
        "types": ["handwritten", "form"],
    }


def test_pages_are_found_with_and_without_their_folder(published):
    options = published("docvqa")
    flat = [blobs for _, blobs in DocVQA(**options)]
    images = Path(options["images"])
    (images / "documents").mkdir()
    for path in images.glob("*.png"):
        shutil.move(path, images / "documents")
    assert [blobs for _, blobs in DocVQA(**options)] == flat


def test_answers_must_be_texts_in_a_list(published):
    options = published("docvqa")
    pages = json.loads(Path(options["file"]).read_text())
    pages["data"][1]["answers"] = "P. Carter"
    pages["data"][2]["questionId"] = "\ud800"  # no UTF-8: could not be written
    Path(options["file"]).write_text(json.dumps(pages))
    (first, _), second = DocVQA(**options)
    assert len(first.annotations) == 1
    assert first.meta["skipped"] == ["1: expected a list of texts, got 'P. Carter'"]
    assert isinstance(second, BadSample) and "surrogates" in str(second)


def test_another_split_is_refused(published):
    with pytest.raises(DataError, match="split: no record has data_split = 'val'; the file has: train"):
        DocVQA(**published("docvqa"), split="val")
