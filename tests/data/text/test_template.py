"""Every shipped template, on every shape of conversation, with the byte-level tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.sample import Box, Media, Text, Turn
from tests.data.text.rendering import NAMES, assistant, layout, load, sample, user
from tests.support.render import render_sample
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.text.spans import special_pattern
from vlm_train.data.text.streams import IGNORE, Stream
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError

# What a template learns behind a conversation.
ENDS = {"perceptionlm": "<|end_of_text|>"}
# What a template learns around an answer.
LEARNED = {
    "plain": "{}\n",
    "paligemma": "{}<eos>",
    "interleaved": "{}<eos>",
    "v0": " {}\n###",
    "vicuna_v1": " {}<eos>",
    "llama2": " {} <eos>",
    "llama3": "{}<|eot_id|>",
    "perceptionlm": "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "chatml": "{}<|im_end|>",
    "qwen2_vl": "{}<|im_end|>",
    "internlm2_chat": "{}<|im_end|>",
    "internvl25": "{}<|im_end|>",
    "nanovlm": "{}<|im_end|>\n",
    "molmo2": "{}<|im_end|>",
    "mistral": " {}<eos>",
    "generic": "{}<|im_end|>",
    "caption": "{}<eos>",
    "caption_bert": "{}[SEP]",
    "caption_opt": "<bos>{}\n",
    "instructblip": " {}<eos>",
    "minigpt4": "{}###",
    "minigpt4_llama2": "{}<eos>",
    "qa": " {}<eos>",
    "seq2seq": "{}<eos>",
}
WITHOUT_MEDIA = {"caption", "caption_bert"}
CASES = {
    "single": sample((user("What?", 0), assistant("Yes, 2 cats.")), media=1),
    "multi_turn": sample((user("What?", 0), assistant("yes"), user("Why?"), assistant("No idea — ok.")), media=1),
    "several_images": sample((user("Same?", 0, 1), assistant("no")), media=2),
    "text_only": sample((user("1 + 1?"), assistant("2"), user("2 + 2?"), assistant("4"))),
    "several_annotations": sample((user("A?", 0), assistant("a")), (user("B?", 0), assistant("bb")), media=1),
}


@pytest.fixture(scope="module")
def tokenizer():
    marks = ["<img>", "</img>"], ["<|global_image|>", "<row_1_col_1>", "<row_8_col_8>"]  # of InternVL, of nanoVLM
    return byte_level(add=[*marks[0], *marks[1]])


def learned(stream: Stream, tokenizer) -> str:
    return tokenizer.decode(stream.labels[stream.labels != IGNORE].tolist())


def text(stream: Stream, tokenizer) -> str:
    return tokenizer.decode([i for i in stream.ids.tolist() if i != PLACEHOLDER_ID])


def test_every_template_says_what_it_learns() -> None:
    assert set(NAMES) == set(LEARNED)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_learned_tokens_are_the_answers(name: str, case: str, tokenizer) -> None:
    template = load(name)
    template.check_tokenizer(tokenizer)
    item = CASES[case]
    stream = render_sample(item, template, tokenizer, layout, annotations="dialogue").llm
    answers = [turn.text for a in item.annotations for turn in a.turns if turn.role == "assistant"]
    expected = "".join(LEARNED[name].format(answer) for answer in answers) + ENDS.get(name, "")
    if stream.ids[0] == tokenizer.bos_token_id:  # nothing stands before it to learn it from
        expected = expected.removeprefix("<bos>")
    assert learned(stream, tokenizer) == expected
    slots = 0 if name in WITHOUT_MEDIA else sum(3 + index for index in range(len(item.media)))
    assert (stream.ids == PLACEHOLDER_ID).sum() == slots
    assert all((stream.ids[s.start : s.end] == PLACEHOLDER_ID).all() for s in stream.slots)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"plain", "caption_opt"} - WITHOUT_MEDIA))
def test_independent_annotations_learn_the_same_answers(name: str, tokenizer) -> None:
    stream = render_sample(CASES["several_annotations"], load(name), tokenizer, layout).llm
    assert learned(stream, tokenizer) == "".join(LEARNED[name].format(a) + ENDS.get(name, "") for a in ("a", "bb"))


@pytest.mark.parametrize("name", ["plain", "caption"])
def test_first_token_learned_from_the_image_cannot_be_shared(name: str, tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.annotations to first"):
        render_sample(CASES["several_annotations"], load(name), tokenizer, layout)
    stream = render_sample(CASES["several_annotations"], load(name), tokenizer, layout, annotations="first").llm
    last = stream.slots[-1].end - 1 if stream.slots else 0
    assert stream.labels[last] == tokenizer.convert_tokens_to_ids("a")  # LLaVA learns it from the last image token


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "<bos>yes\nNo idea — ok.\n"),
        (
            "vicuna_v1",
            "<bos>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
            "helpful, detailed, and polite answers to the user's questions. USER: \nWhat? ASSISTANT: yes<eos>"
            "USER: Why? ASSISTANT: No idea — ok.<eos>",
        ),
        (
            "v0",
            "<bos>A chat between a curious human and an artificial intelligence assistant. The assistant gives "
            "helpful, detailed, and polite answers to the human's questions.\n\n### Human: \nWhat?\n"
            "### Assistant: yes\n### Human: Why?\n### Assistant: No idea — ok.\n###",
        ),
        ("mistral", "<bos>[INST] \nWhat? [/INST] yes<eos>[INST] Why? [/INST] No idea — ok.<eos>"),
        (
            "internlm2_chat",
            f"<bos><|im_start|>system\n{load('internlm2_chat').system}<|im_end|><|im_start|>user\n<img></img>\nWhat?"
            "<|im_end|><|im_start|>assistant\nyes<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
            "No idea — ok.<|im_end|>",
        ),
        (
            "internvl25",
            f"<bos><|im_start|>system\n{load('internvl25').system}<|im_end|>\n<|im_start|>user\n<img></img>\nWhat?"
            "<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nNo idea — ok.<|im_end|>",
        ),
        (
            "perceptionlm",
            "<bos><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You "
            "are able to understand the visual content that the user provides, and assist the user with a variety of "
            "tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNo idea — ok.<|eot_id|><|end_of_text|>",
        ),
        ("interleaved", "<bos>What?yes<eos>Why?No idea — ok.<eos>"),
        ("qa", "<bos>What? yes<eos>Why? No idea — ok.<eos>"),
        ("caption", "<bos>yes<eos>No idea — ok.<eos>"),
    ],
)
def test_whole_text(name: str, expected: str, tokenizer) -> None:
    assert text(render_sample(CASES["multi_turn"], load(name), tokenizer, layout).llm, tokenizer) == expected


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_the_beginning_of_the_training_text(name: str, tokenizer) -> None:
    item = CASES["multi_turn"]
    full = render_sample(item, load(name), tokenizer, layout).llm
    prompt = render_sample(item, load(name), tokenizer, layout, generation=True)
    assert prompt.reference == "No idea — ok."
    assert prompt.llm.supervised == 0
    size = len(prompt.llm)
    np.testing.assert_array_equal(full.ids[:size], prompt.llm.ids)
    assert full.labels[size - 1] == full.ids[size], "the first token after the prompt is the first learned one"
    assert (full.labels[size - 1 :] == [*full.ids[size:], IGNORE]).all()


def test_own_chat_template_equals_its_rendering(tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    stream = render_sample(sample((user("Hi"), assistant("Yo"))), load("generic"), tokenizer, layout).llm
    assert stream.ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids


def test_own_chat_template_is_needed_and_must_end_answers(tokenizer) -> None:
    bare = byte_level()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        load("generic").check_tokenizer(bare)
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="never learn to stop"):
        load("generic").check_tokenizer(bare)


def test_system_turn_replaces_the_default(tokenizer) -> None:
    turns = (Turn(role="system", parts=(Text(text="Be brief."),)), user("Q"), assistant("A"))
    stream = render_sample(sample(turns), load("chatml"), tokenizer, layout).llm
    assert text(stream, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    with pytest.raises(BadSample, match="first turn"):
        render_sample(sample(turns[1:] + turns), load("chatml"), tokenizer, layout)


def test_media_to_the_front_or_where_they_stand(tokenizer) -> None:
    turn = Turn(role="user", parts=(Text(text="See "), Media(item=0), Text(text=" here?")))
    item = sample((turn, assistant("ok")), media=1)
    first = render_sample(item, load("qa", media_suffix="\n"), tokenizer, layout).llm
    inline = render_sample(item, load("qa", media="inline", media_prefix="<", media_suffix=">"), tokenizer, layout).llm
    assert (first.slots[0].start, text(first, tokenizer)) == (1, "<bos>\nSee  here? ok<eos>")
    assert (inline.slots[0].start, text(inline, tokenizer)) == (6, "<bos>See <> here? ok<eos>")


def test_boxes_are_written_by_the_template(tokenizer) -> None:
    answer = Turn(role="assistant", parts=(Text(text="at "), Box(item=0, xyxy=(0.0, 0.25, 0.5, 1.0))))
    item = sample((user("Where?", 0), answer), media=1)
    assert (
        learned(render_sample(item, load("qa"), tokenizer, layout).llm, tokenizer)
        == " at [0.00, 0.25, 0.50, 1.00]<eos>"
    )
    template = load("qa", box="({:.0f},{:.0f}),({:.0f},{:.0f})", box_scale=1000)
    assert learned(render_sample(item, template, tokenizer, layout).llm, tokenizer) == " at (0,250),(500,1000)<eos>"


def test_reference_is_the_answer_as_the_template_writes_it(tokenizer) -> None:
    box = Box(item=0, xyxy=(0.0, 0.25, 0.5, 1.0))
    for parts, expected in {
        (box,): "<0,250,500,1000>",
        (Text(text=" at "), box, Text(text=". ")): "at <0,250,500,1000>.",
        (Media(item=0), Text(text=" here")): "here",
    }.items():
        item = sample((user("Where?", 0), Turn(role="assistant", parts=parts)), media=1)
        template = load("qa", box="<{:.0f},{:.0f},{:.0f},{:.0f}>", box_scale=1000, media="inline", media_prefix="IMG")
        assert render_sample(item, template, tokenizer, layout, generation=True).reference == expected


def test_a_given_lead_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"template\.lead_given: true, but there is no template\.answer_lead"):
        load("qa", lead_given=True, answer_lead="")


def test_template_that_does_not_fit_the_tokenizer(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"template\.special: '<nope>'"):
        load("chatml", special=["<nope>"]).check_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match=r"template\.media: 'last'; allowed: first, inline, drop"):
        load("qa", media="last")


def test_special_pattern_takes_the_longest_and_sees_new_tokens() -> None:
    tokenizer = byte_level()
    assert special_pattern(tokenizer).search("a<|im_end|>b").group() == "<|im_end|>"  # type: ignore[union-attr]
    assert special_pattern(tokenizer).search("<q>") is None
    tokenizer.add_tokens(["<q>"], special_tokens=True)
    assert special_pattern(tokenizer).search("<q>") is not None
    assert special_pattern(tokenizer, ("[X]", "[X]Y")).search("[X]Y").group() == "[X]Y"  # type: ignore[union-attr]
