"""What a configuration gets wrong is said before the weights of a model are read."""

from __future__ import annotations

import pytest

from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.objective import Objective
from vlm_train.errors import ConfigError
from vlm_train.training import prepare_models


class Compares(Objective):
    """An objective that reads a reference."""

    streams = ("llm",)
    normalized_by = "samples"
    needs_reference = True


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(prepare_models, "build_assembly", read)


def test_rules_that_match_nothing_are_found_first() -> None:
    cfg = compose_tiny("recipe=llava15_stage1", "init_from=[]", "params.rules=[{match: visoin, lr: null}]")
    with pytest.raises(ConfigError, match="visoin"):
        prepare_models.prepare_models(cfg, None, shares=False, to_bf16=False)


def test_adapters_are_no_reference_beside_weights_that_learn() -> None:
    reference = ["data.rejected=true", "+objective.mine={_target_: tests.training.test_prepare_models.Compares}"]
    trusted = ["reference.model=start", "allow_targets=[tests.]"]
    cfg = compose_tiny("recipe=llava15_lora", "init_from=[]", *trusted, *reference)
    with pytest.raises(ConfigError, match=r"reference\.model: the model with its adapters off is not a reference"):
        prepare_models.prepare_models(cfg, None, shares=False, to_bf16=False)
