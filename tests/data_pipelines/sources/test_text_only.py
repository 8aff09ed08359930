"""ShareGPT and Alpaca."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources.alpaca import Alpaca
from data_pipelines.sources.sharegpt import ShareGPT


@pytest.fixture
def file(tmp_path):
    def make(records, suffix=".json"):
        path = tmp_path / f"x{suffix}"
        path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
        return str(path)

    return make


def _talk(*names):
    return [{"from": name, "value": f"{name} {number}"} for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("talk", "kept"),
    [
        (_talk("human", "gpt", "human", "gpt"), ["human 0", "gpt 1", "human 2", "gpt 3"]),
        (_talk("system", "user", "chatgpt"), ["system 0", "user 1", "chatgpt 2"]),
        (_talk("gpt", "human", "gpt"), ["human 1", "gpt 2"]),
        (_talk("system", "gpt", "human", "bing", "human"), ["system 0", "human 2", "bing 3"]),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], ["a", "b"]),
    ],
)
def test_sharegpt_begins_with_a_question_and_ends_with_an_answer(file, talk, kept):
    for key in ("conversations", "messages"):
        ((sample, blobs),) = ShareGPT(file=file([{"id": "QWJ_0", key: talk}]))
        (annotation,) = sample.annotations
        assert [turn.text for turn in annotation.turns] == kept and blobs == [] and sample.key == "0000000-QWJ_0"
        assert [turn.role for turn in annotation.turns][-2:] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([], "record 'b': no question with an answer"),
        (_talk("gpt", "gpt", "human"), "no question with an answer"),
        (_talk("human", "human", "gpt"), "turn 1 is of user; questions and answers must alternate"),
        (_talk("system", "human", "gpt", "gpt"), "turn 3 is of assistant"),
        (_talk("human", "tool"), "turn of 'tool'; allowed: human"),
        ([{"from": "human", "value": None}], "turn of 'human' holds None, not text"),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}], "turn 1 is empty"),
        ([{"value": "x"}], "malformed: KeyError: 'role'"),
    ],
)
def test_broken_sharegpt_records_stand_in_their_place(file, talk, reason):
    good = {"id": "a", "conversations": _talk("human", "gpt")}
    records = [good, {"id": "b", "conversations": talk}, good]
    first, bad, last = ShareGPT(file=file(records, ".jsonl"))
    assert isinstance(bad, BadSample) and (first[0].key, last[0].key) == ("0000000-a", "0000002-a")
    with pytest.raises(BadSample, match=reason):
        raise bad
    assert len(list(ShareGPT(file=file(records), limit=1))) == 1


def test_alpaca_prompts(file):
    records = [
        {"instruction": "Add {these}.", "input": "1, 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": ""},
    ]
    (full, _), (bare, _), bad = Alpaca(file=file(records))
    # As PROMPT_DICT of stanford_alpaca's train.py composes them
    assert full.annotations[0].turns[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1, 2\n\n"
        "### Response:"
    )
    assert bare.annotations[0].turns[0].text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:"
    )
    assert [full.annotations[0].turns[1].text, full.key, bare.key] == ["3", "0000000", "0000001"]
    assert str(bad) == "record 2: has no output"
    plain = [sample.annotations[0].turns[0].text for sample, _ in Alpaca(file=file(records[:2]), prompt="plain")]
    assert plain == ["Add {these}.\n\n1, 2", "Greet."]
    with pytest.raises(DataError, match="prompt: got 'llama'; allowed: stanford, plain"):
        Alpaca(file=file([]), prompt="llama")


@pytest.mark.parametrize("null", [None, float("nan"), 7, " "])
def test_alpaca_instructions_are_text(file, null):
    (bad,) = Alpaca(file=file([{"instruction": null, "input": "", "output": "x"}]))
    assert isinstance(bad, BadSample) and str(bad).endswith("has no instruction")


@pytest.mark.parametrize("null", [None, float("nan")])
def test_alpaca_without_an_input(file, null):
    ((sample, _),) = Alpaca(file=file([{"instruction": "Hi", "input": null, "output": "x"}]), prompt="plain")
    assert sample.annotations[0].turns[0].text == "Hi"


def test_sharegpt_keeps_weights_and_the_system_beside(file):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}]
    ((sample, _),) = ShareGPT(file=file([{"system": "French.", "conversations": said}]))
    system, _, answer = sample.annotations[0].turns
    assert (system.role, system.text, answer.weight) == ("system", "French.", 0.0)
