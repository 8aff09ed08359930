"""Weights of turns and system texts in every source of conversations."""

from __future__ import annotations

import json

import pytest

from data_pipelines.sources.internvl import InternVL
from data_pipelines.sources.llava_json import LlavaJSON
from data_pipelines.sources.qwen_vl import QwenVL


@pytest.mark.parametrize("source", ["llava", "qwen", "internvl"])
def test_weights_and_system_texts_are_kept(tmp_path, source):
    human = "user" if source == "qwen" else "human"
    said = [
        {"from": human, "value": "q"},
        {"from": "assistant" if source == "qwen" else "gpt", "value": "a", "loss_weight": 0},
        {"from": human, "value": "r"},
        {"from": "assistant" if source == "qwen" else "gpt", "value": "b"},
    ]
    record = {"id": 1, "system_prompt": "French.", "conversations": said}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    if source == "internvl":
        (tmp_path / "meta.json").write_text(json.dumps({"x": {"root": ".", "annotation": "x.jsonl"}}))
        made = InternVL(meta=str(tmp_path / "meta.json"), folder=str(tmp_path))
    else:
        made = {"llava": LlavaJSON, "qwen": QwenVL}[source](file=str(tmp_path / "x.jsonl"))
    ((sample, _),) = list(made)
    turns = sample.annotations[0].turns
    assert [(turn.role, turn.text, turn.weight) for turn in turns] == [
        ("system", "French.", 1.0),
        ("user", "q", 1.0),
        ("assistant", "a", 0.0),
        ("user", "r", 1.0),
        ("assistant", "b", 1.0),
    ]
