"""TextVQA."""

from __future__ import annotations

import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.textvqa import TextVQA

LLAVA = "{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase."


def test_questions_of_an_image_are_annotations_of_one_sample(published):
    (first, _), (second, _) = TextVQA(**published("textvqa"))
    assert (first.key, second.key) == ("train-0054c91397f2fe05", "train-00a1")
    assert [one.turns[1].text for one in first.annotations] == ["net", "net"]
    assert first.annotations[0].turns[0].text == "what is the brand of phone?"
    assert [note["question_id"] for note in first.meta["annotations"]] == [0, 2]
    assert len(first.meta["annotations"][0]["answers"]) == 10


def test_all_answers_weigh_as_many_as_gave_them(published):
    _, (second, _) = TextVQA(**published("textvqa"), answers="all_weighted")
    assert [one.weight for one in second.annotations] == [0.7, 0.2, 0.1]


def test_ocr_tokens_stand_on_a_line_of_their_own(published, raw):
    tokens = [
        {"image_id": "0054c91397f2fe05", "ocr_tokens": ["MIA", "NOKIA"], "ocr_info": [], "image_width": 1024},
        {"image_id": "00a1", "ocr_tokens": [], "ocr_info": []},
    ]
    ocr = raw.json("TextVQA_Rosetta_OCR_v0.2_train.json", {"data": tokens})
    (first, _), (second, _) = TextVQA(**published("textvqa"), ocr=ocr, prompt=LLAVA)
    asked = [sample.annotations[0].turns[0].text.split("\n") for sample in (first, second)]
    assert asked[0][:2] == ["what is the brand of phone?", "Reference OCR token: MIA, NOKIA"]
    assert asked[1] == ["what does it say?", "Answer the question using a single word or phrase."]


def test_wrong_files_and_options_are_refused(published, raw):
    options = published("textvqa")
    with pytest.raises(DataError, match="split: no record has set_name = 'val'; the file has: train"):
        TextVQA(**options, split="val")
    with pytest.raises(DataError, match="ocr: got None with prompt"):
        TextVQA(**options, prompt=LLAVA)
    with pytest.raises(DataError, match="ocr: got '.*file.*' with prompt"):
        TextVQA(**options, ocr="file")
    with pytest.raises(DataError, match="ocr: .*: not Rosetta OCR: KeyError"):
        TextVQA(**options, ocr=options["file"], prompt=LLAVA)
