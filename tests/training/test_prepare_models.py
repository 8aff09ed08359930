"""What a configuration gets wrong is said before the weights of a model are read."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import command, make_data, train
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.objective import Objective
from vlm_train.errors import ConfigError
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.training import prepare_models
from vlm_train.training.module import VLMModule


class Compares(Objective):
    """An objective that reads a reference."""

    streams = ("llm",)
    normalized_by = "samples"
    needs_reference = True


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(prepare_models, "build_assembly", read)


@pytest.mark.usefixtures("_no_weights")
def test_rules_that_match_nothing_are_found_first() -> None:
    cfg = compose_tiny("recipe=llava15_stage1", "init_from=[]", "params.rules=[{match: visoin, lr: null}]")
    with pytest.raises(ConfigError, match="visoin"):
        prepare_models.prepare_models(cfg, None, shares=False, to_bf16=False)


@pytest.mark.usefixtures("_no_weights")
def test_adapters_are_no_reference_beside_weights_that_learn() -> None:
    reference = ["data.rejected=true", "+objective.mine={_target_: tests.training.test_prepare_models.Compares}"]
    trusted = ["reference.model=start", "allow_targets=[tests.]"]
    cfg = compose_tiny("recipe=llava15_lora", "init_from=[]", *trusted, *reference)
    with pytest.raises(ConfigError, match=r"reference\.model: the model with its adapters off is not a reference"):
        prepare_models.prepare_models(cfg, None, shares=False, to_bf16=False)


def test_a_run_builds_one_model_and_one_without_memory_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = list[str]()
    build, step = PrefixVLM.__init__, VLMModule.training_step

    @wraps(build)
    def build_and_note(self: PrefixVLM, *given: Any, **named: Any) -> None:
        build(self, *given, **named)
        happened.append(next(self.parameters()).device.type)

    def step_and_note(self: VLMModule, *given: Any) -> Any:
        happened.append("step")
        return step(self, *given)

    monkeypatch.setattr(PrefixVLM, "__init__", build_and_note)
    monkeypatch.setattr(VLMModule, "training_step", step_and_note)
    data = make_data(tmp_path / "data")
    train(command(data, tmp_path / "runs", "trainer.max_steps=2", "trainer.log_every=1", "batch.samples=2"))
    assert happened == ["meta", "cpu", "step", "step"]
