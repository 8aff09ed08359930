"""What the sources of questions and regions share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.lint import sample_problems
from data_pipelines.sample import Box, Text
from data_pipelines.sources.common.questions import (
    Prompt,
    group_records,
    make_answers,
    require_text,
    require_whole_number,
)
from data_pipelines.sources.common.samples import make_exchange


def test_box_only_answers_are_answers_and_empty_ones_are_not(sample):
    one, blobs = sample(1)
    prompt, box = [Text(text="Where?")], Box(item=0, xyxy=(0.0, 0.0, 1.0, 1.0))
    assert list(sample_problems(replace(one, annotations=(make_exchange(prompt, box),)), blobs)) == []
    (found,) = sample_problems(replace(one, annotations=(make_exchange(prompt, " "),)), blobs)
    assert (found.kind, found.text) == ("empty answer", "annotation 0: turn 1: empty answer")


def test_prompts_place_texts_and_boxes():
    box = Box(item=0, xyxy=(0.0, 0.0, 1.0, 1.0))
    assert Prompt("At {box}, say:", "prompt", needs=["box"]).fill_prompt(box=box) == (
        Text(text="At "),
        box,
        Text(text=", say:"),
    )
    assert Prompt("{box}", "prompt", needs=["box"]).fill_prompt(box=box) == (box,)
    prompt = Prompt("{question}\nOCR: {ocr}\nBriefly.", "prompt", needs=["question"], may=["ocr"])
    assert prompt.fill_prompt(question="What {ocr}?", ocr="a, b") == (Text(text="What {ocr}?\nOCR: a, b\nBriefly."),)
    assert prompt.fill_prompt(question="What?", ocr="") == (Text(text="What?\nBriefly."),)


@pytest.mark.parametrize("pattern", ["", "Answer.", "{question} {image}", "{question!r}"])
def test_prompts_with_other_fields_are_refused(pattern):
    with pytest.raises(DataError, match=r"prompt: got .*; its fields must be: \{question\}, \{ocr\} \(optional\)"):
        Prompt(pattern, "prompt", needs=["question"], may=["ocr"])


def test_answers_are_weighed_by_how_many_gave_them():
    answers = ["b", "a", "a ", "b", ""]
    ((best, note),) = make_answers([Text(text="?")], answers, "majority", {"question_id": 1})
    assert best.turns[1].text == "b" and note == {"question_id": 1, "answers": answers}  # the first of a tie
    weighed = make_answers([Text(text="?")], answers, "all_weighted", {})
    assert [(one.turns[1].text, one.weight) for one, _ in weighed] == [("b", 0.4), ("a", 0.4)]
    with pytest.raises(BadSample, match="no answers"):
        make_answers([], ["", " "], "majority", {})


def test_records_are_grouped_and_malformed_ones_stand_alone():
    records = [{"image": 2}, {"image": 1}, {}, {"image": [2]}, 7, {"image": 2, "x": 1}]
    assert group_records(records, "image") == [[records[0], records[5]], [records[1]], [{}], [{"image": [2]}], [7]]


@pytest.mark.parametrize("value", [None, 3, "", "  ", ["a"]])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(BadSample, match="expected text"):
        require_text(value)


def test_whole_numbers():
    assert [require_whole_number(3), require_whole_number("0012")] == [3, 12]
    for value in (float("inf"), 1.5, "x", None):
        with pytest.raises(BadSample, match="expected a whole number"):
            require_whole_number(value)


def test_lone_surrogates_are_no_text():
    with pytest.raises(BadSample, match="surrogates"):
        require_text(json.loads('"\\ud800"'))
