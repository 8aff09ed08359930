"""The save and load round trip of a tiny copy."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch

from vlm_train.config.compose import compose_config
from vlm_train.dryrun.report import without_assets
from vlm_train.dryrun.round_trip import round_trip, tiny_copy
from vlm_train.errors import CheckpointError


def recipe(name: str) -> Any:
    return without_assets(compose_config(["dry_run=true", f"recipe={name}"]))[0]


@pytest.mark.parametrize("name", ["llava15_stage1", "llava15_lora", "easyvqa_clip"])
def test_every_tensor_comes_back(name: str) -> None:
    assert round_trip(recipe(name)) > 20


def test_every_tensor_of_an_encoder_decoder_comes_back() -> None:
    overrides = ["recipe=llava15_stage1", "model=prefix_seq2seq", "llm=flant5_xl"]
    cfg = without_assets(compose_config(["dry_run=true", *overrides]))[0]
    assert (tiny_copy(cfg).llm.config.d_model, "hidden_size" in tiny_copy(cfg).llm.config) == (64, False)
    assert round_trip(cfg) > 100


def test_the_twin_is_small_and_of_the_same_parts() -> None:
    cfg = recipe("llava15_stage1")
    copy = tiny_copy(cfg)
    assert (copy.vision.config.hidden_size, copy.llm.weights) == (32, None)
    assert (cfg.vision.config.hidden_size, copy.connector) == (1024, cfg.connector)
    assert tiny_copy(recipe("blip2_stage1")).connector.num_query_tokens == 4


def test_a_save_that_loses_values_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    save = safetensors.torch.save_model

    def damaged(model: Any, path: str) -> None:
        model.connector.layers[0].weight.data += 1
        save(model, path)
        model.connector.layers[0].weight.data -= 1

    monkeypatch.setattr(safetensors.torch, "save_model", damaged)
    with pytest.raises(CheckpointError, match=r"1 tensors differ, for example connector\.layers\.0\.weight"):
        round_trip(recipe("llava15_stage1"))
