"""GQA."""

from __future__ import annotations

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.gqa import GQA


def test_questions_of_an_image_are_annotations_of_one_sample(published):
    (first, _), (second, _) = GQA(**published("gqa"), prompt="Question: {question} Short answer:")
    assert (first.key, second.key) == ("train-2354786", "train-n161313")
    ask, answer = first.annotations[0].turns
    assert ask.parts == (Media(item=0), Text(text="Question: Is the sky dark? Short answer:"))
    assert [answer.text, first.annotations[1].turns[1].text] == ["yes", "pipe"]
    assert first.meta["annotations"] == [{"question_id": "02930152"}, {"question_id": "07333408"}]


def test_full_answers(published):
    (first, _), _ = GQA(**published("gqa"), answer="full")
    assert first.annotations[0].turns[1].text == "Yes, the sky is dark."


def test_wrong_files_and_options_are_refused(published, raw):
    options = published("gqa")
    with pytest.raises(DataError, match="answer: got 'long'; allowed: short, full"):
        GQA(**options, answer="long")
    with pytest.raises(DataError, match="file: .* holds a list; expected questions by their id"):
        GQA(**options | {"file": raw.json("x.json", [])})


def test_a_question_without_image_is_unusable(published, raw):
    file = raw.json("x.json", {"1": {"question": "?", "answer": "a"}, "2": {"imageId": "2354786", "question": "?"}})
    first, second = GQA(**published("gqa") | {"file": file})
    assert isinstance(first, BadSample) and "image of question 1: malformed: KeyError: 'imageId'" in str(first)
    assert isinstance(second, BadSample) and "no usable annotation among 1; 0: malformed: KeyError: 'answer'" in str(
        second
    )
