"""Samples of models that read several token streams: an encoder-decoder's, and a Q-Former's instruction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Text, Turn
from tests.data.text.rendering import assistant, layout, load, sample, user
from tests.support.render import render_sample
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import Grid3
from vlm_train.data.collate import Example, collate_prompts, collate_rows
from vlm_train.data.images.plan import Views
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.order.lengths import hash_content
from vlm_train.data.show import format_tokens
from vlm_train.data.text.instruction import Instruction
from vlm_train.data.text.render import TokenizedSample
from vlm_train.data.text.streams import IGNORE, Stream
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import AssetError, ConfigError

PAIR = {"llm": "none", "decoder": "seq2seq"}
WITH_QFORMER = {"llm": "causal", "qformer": "none"}
DIALOGUE = (user("Hi?", 0), assistant("yes"), user("Why?"), assistant("so"))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def paired(item, tokenizer, template=None, **options) -> TokenizedSample:
    return render_sample(item, template or load("seq2seq"), tokenizer, layout, streams=PAIR, **options)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text).ids


def written(stream: Stream, tokenizer) -> str:
    return tokenizer.decode([i for i in stream.ids.tolist() if i != PLACEHOLDER_ID])


def test_prompt_and_answer_by_hand(tokenizer) -> None:
    streams = paired(sample((user("Hi?", 0), assistant("no")), media=1), tokenizer).streams
    prompt, answer = streams["llm"], streams["decoder"]
    h, i, ask, n, o, eos = *ids_of(tokenizer, "Hi?no"), tokenizer.eos_token_id
    assert prompt.ids.tolist() == [*[PLACEHOLDER_ID] * 3, h, i, ask, eos]
    assert (prompt.labels == IGNORE).all() and not prompt.weights.any() and prompt.alignment == "none"
    assert (prompt.attention_group == -1).all() and prompt.positions.tolist() == [list(range(7))]
    assert answer.ids.tolist() == [tokenizer.pad_token_id, n, o]
    assert answer.labels.tolist() == [n, o, eos] and answer.weights.tolist() == [1.0, 1.0, 1.0]
    assert answer.alignment == "seq2seq" and not answer.attention_group.any() and not answer.slots


def test_all_before_the_last_answer_is_the_prompt(tokenizer) -> None:
    item = sample(Annotation(turns=(*DIALOGUE, user("And?")), weight=0.5), media=1)
    streams = paired(item, tokenizer).streams
    assert written(streams["llm"], tokenizer) == "Hi?<eos>yes<eos>Why?<eos>"
    answer = streams["decoder"]
    assert tokenizer.decode(answer.labels.tolist()) == "so<eos>" and answer.weights.tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["qa", "vicuna_v1", "chatml", "llama3", "generic", "llama2"])
def test_every_template_can_be_cut_there(name: str, tokenizer) -> None:
    item, template = sample(DIALOGUE, media=1), load(name)
    whole = render_sample(item, template, tokenizer, layout).llm
    streams = paired(item, tokenizer, template).streams
    answer = streams["decoder"].labels.tolist()
    assert [*streams["llm"].ids.tolist(), *answer] == whole.ids.tolist()[: len(streams["llm"]) + len(answer)]


def test_generation_asks_what_training_asked(tokenizer) -> None:
    item = sample(DIALOGUE, media=1)
    asked = paired(item, tokenizer, generation=True)
    trained = paired(item, tokenizer).streams["llm"]
    assert list(asked.streams) == ["llm"] and asked.reference == "so" and asked.media == (0,)
    for name in ("ids", "labels", "attention_group", "positions"):
        assert np.array_equal(getattr(asked.llm, name), getattr(trained, name)), name
    assert asked.llm.alignment == "none"


def test_what_cannot_be_two_streams(tokenizer) -> None:
    several = sample((user("A?", 0), assistant("a")), (user("B?", 0), assistant("b")), media=1)
    with pytest.raises(ConfigError, match=r"'s1'.*2 independent annotations.*data\.annotations"):
        paired(several, tokenizer)
    assert paired(several, tokenizer, annotations="first").streams["decoder"].supervised == 2
    with pytest.raises(BadSample, match="no answer"):
        paired(sample((user("A?", 0),), media=1), tokenizer)
    with pytest.raises(BadSample, match="shows media"):
        item = sample((user("Draw"), Turn(role="assistant", parts=user("x", 0).parts)), media=1)
        paired(item, tokenizer)
    with pytest.raises(BadSample, match="no supervised token"):
        paired(sample((user("A?", 0), assistant("a", weight=0.0)), media=1), tokenizer)


def test_a_prompt_is_cut_on_its_left_and_an_answer_on_its_right(tokenizer) -> None:
    item = sample((user("abcdefgh", 0), assistant("ABCDEFGH")), media=1)
    streams = paired(item, tokenizer, max_length=6, over_length="truncate").streams
    assert streams["llm"].ids.tolist() == [*[PLACEHOLDER_ID] * 3, *ids_of(tokenizer, "gh"), tokenizer.eos_token_id]
    assert streams["llm"].positions.tolist() == [list(range(6))] and streams["llm"].slots[0].end == 3
    answer = streams["decoder"]
    assert tokenizer.decode(answer.labels.tolist()) == "ABCDE<eos>" and answer.supervised == 6  # its end is kept
    with pytest.raises(BadSample, match="would cut an image"):
        paired(item, tokenizer, max_length=2, over_length="truncate")
    with pytest.raises(BadSample, match="12 tokens"):
        paired(item, tokenizer, max_length=6)


def test_prefix_language_modeling_cuts_up_to_the_middle(tokenizer) -> None:
    seen = set()
    for number in range(40):
        item = replace(sample((user("", 0), assistant("one two three four five")), media=1), key=f"key {number}")
        streams = paired(item, tokenizer, prefix_split=True).streams
        prompt = written(streams["llm"], tokenizer).removesuffix("<eos>")
        answer = tokenizer.decode(streams["decoder"].labels.tolist()).removesuffix("<eos>")
        assert f"{prompt} {answer}" == "one two three four five"
        assert streams["llm"].ids.tolist() == paired(item, tokenizer, prefix_split=True).llm.ids.tolist()
        seen.add(prompt)
    assert seen == {"one", "one two"}
    asked = paired(item, tokenizer, prefix_split=True, generation=True)
    assert written(asked.llm, tokenizer) == "<eos>" and asked.reference == "one two three four five"


def test_prefix_follows_the_question(tokenizer) -> None:
    streams = paired(sample((user("Say", 0), assistant("a b")), media=1), tokenizer, prefix_split=True).streams
    assert written(streams["llm"], tokenizer) == "Say a<eos>"
    alone = paired(sample((assistant("a b"),)), tokenizer, prefix_split=True).streams
    assert written(alone["llm"], tokenizer) == "a<eos>"
    whole = paired(sample((user("Say", 0), assistant("word")), media=1), tokenizer, prefix_split=True).streams
    assert written(whole["llm"], tokenizer) == "Say<eos>"
    weighted = Turn(role="assistant", parts=(Text(text="a bc", weights=((0, 3, 2.0),)),))
    learned = paired(sample((user("", 0), weighted), media=1), tokenizer, prefix_split=True).streams["decoder"]
    assert learned.weights.tolist() == [2.0, 1.0, 1.0]


PLANS = {"vision": ImageTransform(size=(8, 8))}


def item_of(rendered: TokenizedSample, number: int) -> Example:
    view = Views(np.full((1, 3, 8, 8), number, np.uint8), (Grid3(1, 1, 1),))
    return Example(rendered, {"vision": [view] * len(rendered.media)}, source="s")


def test_collate_pads_every_stream_by_itself(tokenizer) -> None:
    texts = [("Hi?", "no"), ("Long question?", "y")]
    rows = [[item_of(paired(sample((user(a, 0), assistant(b)), media=1), tokenizer), n)] for n, (a, b) in
            enumerate(texts)]  # fmt: skip
    batch = collate_rows(rows, PLANS)
    prompt, answer = batch.text["llm"], batch.text["decoder"]
    assert prompt.ids.shape == (2, 18) and answer.ids.shape == (2, 3)
    assert (prompt.alignment, answer.alignment) == ("none", "seq2seq")
    assert answer.labels.tolist()[1] == [*ids_of(tokenizer, "y"), tokenizer.eos_token_id, IGNORE]
    assert answer.supervised is not None and answer.supervised.tolist() == [0, 1, 2, 3, 4]
    assert answer.plain_causal and not prompt.plain_causal and prompt.masked is not None
    assert prompt.slots.index.tolist() == [0, 1, 2, 18, 19, 20] and len(answer.slots.index) == 0
    assert batch.media.slot_counts == (3, 3) and prompt.supervised is not None and len(prompt.supervised) == 0


def bert(folder: Path) -> str:
    """A word-piece tokenizer as BERT's, with [CLS] and [SEP] around every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "it", "?", "[", "]", "sep", "red", "a", "b", "c", "d"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(folder)
    return str(folder)


def test_instruction_by_hand(tmp_path: Path, tokenizer) -> None:
    instruction = Instruction(tokenizer=bert(tmp_path), max_length=6)
    item = sample((user("What is it?", 0), assistant("red")), media=1)
    options = {"streams": WITH_QFORMER, "instruction": instruction}
    rendered = render_sample(item, load("qa"), tokenizer, layout, **options)
    stream = rendered.streams["qformer"]
    assert stream.ids.tolist() == [2, 4, 5, 6, 7, 3]
    assert (stream.labels == IGNORE).all() and (stream.attention_group == -1).all() and stream.alignment == "none"
    assert rendered.llm.ids.tolist() == render_sample(item, load("qa"), tokenizer, layout).llm.ids.tolist()
    asked = render_sample(item, load("qa"), tokenizer, layout, generation=True, **options)
    assert asked.streams["qformer"].ids.tolist() == stream.ids.tolist() and asked.reference == "red"
    assert instruction("a b c d what is").ids.tolist() == [2, 14, 15, 4, 5, 3]  # its end stays
    assert instruction("[SEP]").ids.tolist() == [2, 8, 10, 9, 3]  # text, not the end of one
    assert instruction("").ids.tolist() == [2, 3]
    batch = collate_prompts([(asked, {"vision": [PLANS["vision"].blank()]})], PLANS)
    assert batch.text["qformer"].ids.tolist() == [[2, 4, 5, 6, 7, 3]]
    with pytest.raises(ConfigError, match=r"instruction\.max_length: 2"):
        Instruction(tokenizer=str(tmp_path), max_length=2)
    with pytest.raises(AssetError, match=r"instruction\.tokenizer: no tokenizer could be loaded from"):
        Instruction(tokenizer=str(tmp_path / "none"))


def test_instruction_of_several_turns_has_no_answers(tokenizer) -> None:
    options = {"streams": WITH_QFORMER, "instruction": Instruction(tokenizer=None)}
    rendered = render_sample(sample(DIALOGUE, media=1), load("qa"), tokenizer, layout, **options)
    assert tokenizer.decode(rendered.streams["qformer"].ids.tolist()) == "Hi? Why?"
    nothing = render_sample(sample((user("", 0), assistant("a")), media=1), load("qa"), tokenizer, layout, **options)
    assert nothing.streams["qformer"].ids.tolist() == [tokenizer.pad_token_id]


def test_a_missing_instruction_is_named(tokenizer) -> None:
    with pytest.raises(ConfigError, match="instruction is empty"):
        render_sample(sample(DIALOGUE, media=1), load("qa"), tokenizer, layout, streams=WITH_QFORMER)


def test_lengths_depend_on_the_instruction(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    prints = {hash_content(Instruction(tokenizer=name, max_length=n)) for name, n in ((folder, 8), (folder, 9))}
    assert len(prints) == 2 and hash_content(Instruction(tokenizer=folder, max_length=8)) in prints


def test_show_names_every_stream(tokenizer) -> None:
    text = format_tokens(paired(sample(DIALOGUE, media=1), tokenizer), tokenizer, color=False)
    assert "stream llm: " in text and "both directions: tokens 0-" in text
    assert "stream decoder: 3 tokens, 3 learned" in text and "«so»" in text


def test_show_reads_an_instruction_by_its_own_tokenizer(tmp_path: Path, tokenizer) -> None:
    instruction = Instruction(tokenizer=bert(tmp_path))
    item = sample((user("what is it", 0), assistant("a")), media=1)
    rendered = render_sample(item, load("qa"), tokenizer, layout, streams=WITH_QFORMER, instruction=instruction)
    assert "[CLS] what is it [SEP]" in format_tokens(rendered, tokenizer, False, {"qformer": instruction.tokenizer})
