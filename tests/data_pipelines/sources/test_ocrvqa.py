"""OCR-VQA."""

from __future__ import annotations

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources.ocrvqa import OCRVQA


def test_questions_of_a_book_are_annotations_of_one_sample(published):
    (first, _), (second, _) = OCRVQA(**published("ocrvqa"))
    assert (first.key, second.key) == ("train-761183272", "train-B001")
    assert [tuple(turn.text for turn in one.turns) for one in first.annotations] == [
        ("Who wrote this book?", "Mary Kay Andrews"),
        ("What is the genre of this book?", "Calendars"),
    ]
    assert first.meta["annotations"] == [{"question_id": 0}, {"question_id": 1}]
    assert second.media[0].name == "0.png"  # found by the extension of its URL


def test_splits_are_numbers_in_the_file(published):
    options = published("ocrvqa")
    assert len(OCRVQA(**options, split="test")) == 1
    with pytest.raises(DataError, match="split: no record has split = 2; the file has: 1, 3"):
        OCRVQA(**options, split="val")
    with pytest.raises(DataError, match="split: got 'dev'; allowed: train, val, test"):
        OCRVQA(**options, split="dev")


def test_unequal_questions_and_answers_are_unusable(published, raw):
    book = {"split": 1, "questions": ["a?", "b?"], "answers": ["a"], "imageURL": "http://x/y.jpg"}
    blank = {**book, "answers": ["a", ""]}
    file = raw.json("x.json", {"761183272": book, "B001": {**blank, "imageURL": "http://x/y.png"}})
    bad, (sample, _) = OCRVQA(**published("ocrvqa") | {"file": file})
    assert isinstance(bad, BadSample) and str(bad) == "book '761183272': 2 questions, 1 answers"
    assert len(sample.annotations) == 1 and sample.meta["skipped"] == ["1: expected text, got ''"]
