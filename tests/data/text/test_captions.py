"""Captions as BLIP cleans them, and texts that are cut before their end."""

from __future__ import annotations

import pytest

from data_pipelines.sample import Annotation, Text
from tests.data.text.rendering import assistant, layout, load, sample, user
from tests.support.render import render_sample
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.text.captions import clean_answers, clean_caption
from vlm_train.data.text.streams import IGNORE
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Red Cat.", "a red cat"),
        ('  "Two" (2) dogs: one; two~ #tag * end!\n', "two 2 dogs one two tag end"),
        ("kept, as-is: it's 'so'", "kept, as-is it's 'so'"),
        ("one\ntwo  three", "one\ntwo three"),
        ("a b c d e f", "a b c d"),
        ("...", ""),
    ],
)
def test_a_caption_is_cleaned(caption: str, cleaned: str) -> None:
    """As `pre_caption` of github.com/salesforce/BLIP (056a169), data/utils.py, does."""
    assert clean_caption(Text(text=caption), 4 if caption == "a b c d e f" else 30).text == cleaned


def test_weighted_stretches_move_along() -> None:
    text = Text(text="A  big. CAT and a dog", weights=((3, 6, 0.5), (8, 11, 2.0), (17, 21, 3.0)))
    cleaned = clean_caption(text, 3)
    assert cleaned.text == "a big cat"
    assert [(cleaned.text[a:b], weight) for a, b, weight in cleaned.weights] == [("big", 0.5), ("cat", 2.0)]


def test_only_answers_are_cleaned_and_only_to_be_learned() -> None:
    annotation = Annotation(turns=(user("What?!"), assistant("A Cat.")), rejected=assistant("A DOG."))
    cleaned = clean_answers(annotation, 5)
    assert [turn.text for turn in cleaned.turns] == ["What?!", "a cat"] and cleaned.rejected is not None
    assert cleaned.rejected.text == "a dog"
    template, tokenizer = load("caption", caption_words=5), byte_level()
    one = sample((user("What?!"), assistant("A Cat.")))
    stream = render_sample(one, template, tokenizer, NoMedia()).llm
    assert tokenizer.decode(stream.ids.tolist()) == "<bos>a cat<eos>"
    assert render_sample(one, template, tokenizer, NoMedia(), generation=True).reference == "A Cat."
    with pytest.raises(ConfigError, match=r"template\.caption_words: 0"):
        load("caption", caption_words=0)


def test_a_caption_that_is_cut_keeps_its_end() -> None:
    tokenizer, one = byte_level(), sample((assistant("abcdefgh"),))
    how = {"max_length": 5, "over_length": "truncate"}
    kept = render_sample(one, load("caption", keep_end=True), tokenizer, NoMedia(), **how).llm
    cut = render_sample(one, load("caption"), tokenizer, NoMedia(), **how).llm
    assert tokenizer.decode(kept.ids.tolist()) == "<bos>abc<eos>" and tokenizer.decode(cut.ids.tolist()) == "<bos>abcd"
    learned = [tokenizer.decode(kept.labels[kept.labels != IGNORE].tolist())]
    assert learned == ["abc<eos>"] and kept.labels[-1] == IGNORE and kept.weights.tolist() == [1, 1, 1, 1, 0]
    whole = render_sample(one, load("caption", keep_end=True), tokenizer, NoMedia(), max_length=10).llm
    assert tokenizer.decode(whole.ids.tolist()) == "<bos>abcdefgh<eos>"


def test_a_decoder_s_text_that_is_cut_keeps_its_end() -> None:
    tokenizer, one = byte_level(), sample((user("q", 0), assistant("abcdefgh")), media=1)
    streams = {"llm": "none", "decoder": "seq2seq"}
    how = {"max_length": 5, "over_length": "truncate", "streams": streams}
    stream = render_sample(one, load("seq2seq"), tokenizer, layout, **how).streams["decoder"]  # type: ignore[arg-type]
    assert tokenizer.decode(stream.labels.tolist()) == "abcd<eos>" and stream.weights.tolist() == [1] * 5
    assert tokenizer.decode(stream.ids.tolist()) == "<pad>abcd"


def test_an_image_without_a_question_takes_no_line_break_in_llava() -> None:
    tokenizer = byte_level()
    for name, text in (("vicuna_v1", "USER:  ASSISTANT: A cat.<eos>"), ("llama2", "<</SYS>>\n\n [/INST] A cat. <eos>")):
        one = sample((user("", 0), assistant("A cat.")), media=1)
        asked = sample((user("What?", 0), assistant("A cat.")), media=1)
        ids = [render_sample(one, load(name), tokenizer, layout).llm.ids for one in (one, asked)]
        spelled = [tokenizer.decode([token for token in some.tolist() if token >= 0]) for some in ids]
        assert spelled[0].endswith(text) and "\nWhat?" in spelled[1], name
