"""Exported chat templates: a served prompt has the ids that our own renderer gives, or there is no template."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from data_pipelines.sample import Media, Text, Turn
from tests.data.text.rendering import NAMES, assistant, load, sample, user
from tests.support.render import render_sample
from tests.support.tiny_models import tiny_vision
from vlm_train.contracts.layout import PLACEHOLDER_ID, GridLayout, MediaSize
from vlm_train.contracts.media import Grid3
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import ChatTemplate
from vlm_train.data.text.tokenizer import byte_level, word_tokenizer
from vlm_train.errors import ConfigError
from vlm_train.export.chat import add_chat_template
from vlm_train.export.llava import IMAGE_TOKEN, make_processor
from vlm_train.models.connectors.grids import same_grid

CHATS = [name for name in NAMES if name not in ("caption", "caption_bert")]  # which place no image


def two_by_two(size: object) -> tuple[Grid3, ...]:
    return (Grid3(1, 2, 2),)


LAYOUT = GridLayout(two_by_two, same_grid)


@lru_cache
def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Marks the start of a text as sentencepiece does: Vicuna's tokenizer is of this kind ("first")."""
    alphabet = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "▁", "\n", *alphabet, "▁A", "▁What", "US", "ER"]
    merges = [("▁", "A"), ("▁", "W"), ("▁W", "h"), ("▁Wh", "a"), ("▁Wha", "t"), ("U", "S"), ("E", "R")]
    pieces += ["▁W", "▁Wh", "▁Wha"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    if scheme == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        add_bos_token=True,
    )  # fmt: skip


TOKENIZERS = {
    "bytes": lru_cache(byte_level),
    "words": lambda: word_tokenizer(["What color is the square in the picture ? Red : . # USER ASSISTANT"]),
    "sentencepiece": lambda: metaspace("first"),
    "sentencepiece, legacy": lambda: metaspace("normalizer"),
}


def exported(folder: Path, template: Any, tokenizer: Any) -> tuple[str | None, Any]:
    """What `add_chat_template` says, and the processor as a user reads it."""
    copy = PreTrainedTokenizerFast.from_pretrained(
        tokenizer.save_pretrained(folder / "tokenizer") and folder / "tokenizer"
    )
    copy.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    make_processor(tiny_vision(), copy, "resize").save_pretrained(folder / "export")
    ours = Processor(tokenizer=tokenizer, template=template, layout=LAYOUT)
    problem = add_chat_template(folder / "export", ours, MediaSize(32, 32))
    return problem, AutoProcessor.from_pretrained(folder / "export")


CONVERSATIONS = {
    "image": (user("  What color is it?\n", 0),),
    "several turns and images": (user("What color?", 0), assistant("Red."), user("And the other?", 1)),
    "two images at once": (user("What color?", 0, 1), assistant("Red."), user("Sure?"), assistant("Yes"), user("Why?")),
    "system": (Turn(role="system", parts=(Text(text="Say one word."),)), user("What's this?", 0)),
    "text only": (user(" What is a \\square\\?"), assistant('It\'s "A" <b>'), user("What?")),
    "inside": (Turn(role="user", parts=(Text(text="Is "), Media(item=0), Text(text=" red? "))),),
}


def message(turn: Turn) -> dict[str, Any]:
    if all(isinstance(part, Text) for part in turn.parts):
        return {"role": turn.role, "content": turn.text}
    content = [{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in turn.parts]
    return {"role": turn.role, "content": content}


def check_parity(processor: Any, template: Any, tokenizer: Any, turns: tuple[Turn, ...]) -> None:
    count = sum(isinstance(part, Media) for turn in turns for part in turn.parts)
    ours = render_sample(
        sample(turns, media=count), template, tokenizer, LAYOUT, annotations="first", generation=True
    ).llm.ids
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = processor.apply_chat_template([message(turn) for turn in turns], add_generation_prompt=True)
    theirs = processor(text=text, images=[Image.new("RGB", (40, 30))] * count or None)["input_ids"][0]
    assert list(theirs) == [image if token == PLACEHOLDER_ID else token for token in ours.tolist()], text
    tokens = processor.tokenizer.apply_chat_template(
        [message(turn) for turn in turns], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert count or list(tokens) == ours.tolist(), "servers tokenise without special tokens"


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_served_ids_are_those_of_training(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer, template = TOKENIZERS[kind](), load(name)
    try:
        template.check_tokenizer(tokenizer)
    except ConfigError:
        pytest.skip(f"{name} does not go with {kind}")
    problem, processor = exported(tmp_path, template, tokenizer)
    if kind.startswith("sentencepiece") and name.startswith("minigpt4"):  # its prompts are tokenized apart
        assert problem and "differ from training's" in problem and processor.chat_template is None
        return
    assert problem is None
    for turns in CONVERSATIONS.values():
        check_parity(processor, template, tokenizer, turns)


@pytest.mark.parametrize("changes", [{"media": "inline", "strip": True}, {"media_prefix": "<", "media_suffix": "'>\n"}])
def test_content_styles(changes: dict[str, Any], tmp_path: Path) -> None:
    template = load("vicuna_v1", **changes, system='It\'s a "test" é 😀')
    problem, processor = exported(tmp_path, template, byte_level())
    assert problem is None
    for turns in CONVERSATIONS.values():
        check_parity(processor, template, byte_level(), turns)


class Shouting(ChatTemplate):
    """A template of one's own that Jinja cannot know."""

    def make_spans(self, turns, tokenizer, *, generation=False):
        return super().make_spans(turns, tokenizer, generation=generation)[1:]


def test_without_a_faithful_template_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, processor = exported(tmp_path / "own", Shouting(assistant_suffix="{eos}"), byte_level())
    assert problem == "Shouting cannot be written as one"
    assert processor.chat_template is None and processor.tokenizer.chat_template is None, "ChatML came along"
    assert processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id, "training had it"

    monkeypatch.setattr("vlm_train.export.chat.jinja_templates", lambda *_: ["{{ 'USER:' }}", "{{ oops( }}"])
    problem, processor = exported(tmp_path / "wrong", load("qa"), byte_level())
    assert problem is not None and "transformers cannot use it (TemplateSyntaxError" in problem
    assert processor.chat_template is None
