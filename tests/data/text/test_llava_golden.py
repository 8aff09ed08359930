"""Ids and labels of LLaVA's templates against those of its published code, through a real sentencepiece model.

`golden/llava_text.json` holds what `preprocess_v1`, `preprocess_plain`, `preprocess_llama_2` and the v0 template of
github.com/haotian-liu/LLaVA (c121f04) gave for made conversations, with the image's tokens as one -200 and labels
that are not shifted. The tokenizer is the LLaMA-type model `tokenizer.model.v1` of the package mistral-common, alone in
a folder as Vicuna's is, under both of Vicuna's settings of `legacy`.
"""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.sample import Annotation
from data_pipelines.sources.common.conversations import IMAGE, read_turn, to_turn
from tests.data.text.rendering import load, sample
from tests.data.text.test_template_golden import data_file
from tests.support.render import render_sample
from vlm_train.contracts.layout import Slot
from vlm_train.contracts.media import Grid3
from vlm_train.data.text.streams import IGNORE
from vlm_train.data.text.tokenizer import pretrained

CASES = json.loads((Path(__file__).parent / "golden" / "llava_text.json").read_text(encoding="utf-8"))
TEMPLATES = {"v1": "vicuna_v1", "plain": "plain", "llava_llama_2": "llama2", "v0": "v0"}
IMAGE_TOKEN = -200

MEANT = {
    "empty_answer": "LLaVA never ends an answer without text; here it learns its end",
    "empty_answer_then_more": "likewise",
    "gpt_first": "LLaVA leaves out an answer without a question; here it is learned",
    "human_last": "nothing after the last answer is learned, so it is left out here",
    "contains_eos": "what spells </s> in a text is text here, and the end of the text in LLaVA",
    "two_tags_one_turn": "LLaVA keeps one image of several in a turn",
}
"""Where we differ on purpose, and why. In v1 an answer that spells "ASSISTANT: " is learned here, and not in LLaVA."""


pytestmark = pytest.mark.slow  # reading the two tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("sentencepiece")
    found = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("vicuna")
        shutil.copy(data_file("mistral_common", "data/tokenizer.model.v1"), folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found[f"legacy={str(legacy).lower()}"] = pretrained(name=str(folder))
    return found


def one_slot(sizes: Any) -> list[list[Slot]]:
    return [[Slot(item, 1, Grid3(1, 1, 1))] for item in range(len(sizes))]


def render(case: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids, and labels that are not shifted."""
    turns = [read_turn({"from": who, "value": text}) for who, text in case["conversations"]]
    numbers = {IMAGE: count()}
    annotation = Annotation(turns=tuple(to_turn(role, text, numbers) for role, text in turns))
    images = next(numbers[IMAGE])
    stream = render_sample(sample(annotation, media=images), load(TEMPLATES[case["template"]]), tokenizer, one_slot).llm
    ids = [IMAGE_TOKEN if token < 0 else token for token in stream.ids.tolist()]
    return ids, [IGNORE, *stream.labels.tolist()[:-1]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}-{case['tokenizer']}-{case['case']}")
def test_ids_and_labels_are_those_of_llava(case: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    ids, labels = render(case, tokenizers[case["tokenizer"]])
    if case["case"] == "contains_assistant" and case["template"] == "v1":
        assert ids == case["ids"] and set(case["labels"]) == {IGNORE} != set(labels)
    elif case["case"] in MEANT:
        assert (ids, labels) != (case["ids"], case["labels"]), MEANT[case["case"]]
    elif case["template"] == "v0":  # it ends with "### ", and learns other tokens of the headers, see the template
        assert ids == case["ids"][:-1] and labels[-1] == ids[-1]
    else:
        assert ids == case["ids"]
        assert labels == case["labels"]
