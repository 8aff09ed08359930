"""Texts that are far too long are shortened or refused before they are tokenized."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Text, Turn
from tests.data.text.rendering import assistant, load, sample, user
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import CHARACTERS_PER_TOKEN, RenderOptions, bound_texts
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError


class Counting:
    """A tokenizer's core that notes how much it was given."""

    def __init__(self, core) -> None:
        self.core, self.longest = core, 0

    def encode(self, text: str, **options):
        self.longest = max(self.longest, len(text))
        return self.core.encode(text, **options)


def render(text: str, options: RenderOptions, monkeypatch: pytest.MonkeyPatch):
    tokenizer = byte_level()
    core = Counting(tokenizer.backend_tokenizer)
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", core)
    processor = Processor(tokenizer=tokenizer, template=load("plain"), layout=lambda media: [])
    found = sample((user("Say it."), assistant(text)), (user("Again."), assistant("No.")))
    return processor.render(found, options).llm, core.longest


def test_a_long_answer_is_cut_as_its_tokens_are(monkeypatch):
    text = "".join(map(str, range(30_000)))
    how = RenderOptions(annotations="dialogue", max_length=16, over_length="truncate")
    short, seen = render(text, how, monkeypatch)
    monkeypatch.undo()
    assert len(short) == 16 and seen <= 17 * CHARACTERS_PER_TOKEN
    monkeypatch.setattr("vlm_train.data.text.render.CHARACTERS_PER_TOKEN", 10**9)
    whole, seen = render(text, how, monkeypatch)
    assert seen > 100_000 and np.array_equal(short.ids, whole.ids) and np.array_equal(short.labels, whole.labels)


@pytest.mark.parametrize("over_length", ["drop", "split", "error"])
def test_long_texts_are_refused_unread(over_length, monkeypatch):
    how = RenderOptions(annotations="dialogue", max_length=16, over_length=over_length)
    error = ConfigError if over_length == "error" else BadSample
    with pytest.raises(error, match="100003 characters, but data.max_length is 16 tokens") as found:
        bound_texts([Annotation(turns=(assistant("x" * 100_003),))], how, cut=True)
    assert over_length == "error" or found.value.kind == "too_long"


def test_weighted_stretches_and_rejected_answers_are_cut_too():
    text = Text(text="abc" * 2000, weights=((0, 10, 2.0), (100, 6000, 3.0), (5000, 6000, 1.0)))
    one = Annotation(turns=(user("?"), Turn(role="assistant", parts=(text,))), rejected=assistant("x" * 9000))
    how = RenderOptions(max_length=16, over_length="truncate")
    (found,) = bound_texts([one], how, cut=True)
    most = 16 * CHARACTERS_PER_TOKEN
    (cut,) = found.turns[1].parts
    assert len(cut.text) == most - 1 and cut.weights == ((0, 10, 2.0), (100, most - 1, 3.0))
    assert len(found.rejected.text) == most
    with pytest.raises(BadSample, match="15001 characters"):
        bound_texts([one], how, cut=False)
    assert bound_texts([one], RenderOptions(max_length=None), cut=True) == [one]
