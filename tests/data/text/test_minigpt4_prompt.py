"""MiniGPT-4 tokenizes prompt and answer by themselves, so that a lone `▁` stands between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.text.rendering import assistant, layout, load, sample, user
from tests.data.text.test_tokenizer import only_a_sentencepiece_model
from tests.support.render import render_sample
from vlm_train.data.text.streams import IGNORE
from vlm_train.data.text.tokenizer import pretrained


@pytest.mark.parametrize(
    ("template", "before", "after", "end"),
    [
        ("minigpt4", "###Human: <Img>", "</Img> What is it? ###Assistant: ", "###"),
        ("minigpt4_llama2", "[INST] <Img>", "</Img> What is it? [/INST] ", "</s>"),
    ],
)
def test_ids_are_those_of_the_pieces(template: str, before: str, after: str, end: str, tmp_path: Path) -> None:
    """minigpt4/models/minigpt_base.py (d94738a): `prompt_wrap` encodes what stands before and behind the image, and
    `preparing_embedding` the answer with its end; bos is put in front."""
    pytest.importorskip("sentencepiece")
    tokenizer = pretrained(name=str(only_a_sentencepiece_model(tmp_path)))
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after, f"a  cat{end}")]
    one = sample((user("What is it?", 0), assistant("a  cat")), media=1)
    stream = render_sample(one, load(template), tokenizer, layout).llm
    assert [token for token in stream.ids.tolist() if token >= 0] == [1, *pieces[0], *pieces[1], *pieces[2]]
    assert stream.labels[stream.labels != IGNORE].tolist() == pieces[2]
    space = tokenizer.convert_tokens_to_ids("▁")
    assert pieces[1][-1] == space and tokenizer.convert_ids_to_tokens(pieces[2][0]) == "▁a"
    prompt = render_sample(one, load(template), tokenizer, layout, generation=True).llm
    assert prompt.ids.tolist() == stream.ids[: len(prompt)].tolist(), "generation goes on where training began"
