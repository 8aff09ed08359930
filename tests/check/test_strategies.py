"""What a strategy can do, its class says, in a package of one's own too."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from vlm_train.check.check import check_config
from vlm_train.check.strategies import DECLARED, shards_weights
from vlm_train.config.compose import compose_config
from vlm_train.config.folders import config_dir
from vlm_train.config.resolve import resolve_key
from vlm_train.config.signatures import UnknownTarget, import_target, read_attribute
from vlm_train.errors import ConfigError
from vlm_train.training.strategies.fsdp import FSDP2
from vlm_train.training.strategies.state import OwnState
from vlm_train.training.strategies.zero import ZeRO

ZERO = "vlm_train.training.strategies.zero.ZeRO"


class Slices(FSDP2):
    """Inherits what it can do."""

    compiles_shards = False


class Alone(OwnState, DDPStrategy):
    spans_processes = False


class Silent(DDPStrategy):
    """Lightning's own says nothing."""


def problems(name: str, *overrides: str, recipe: str = "llava15_stage1") -> list[str]:
    own = ["allow_targets=[tests.]", f"++strategy={{_target_: {__name__}.{name}}}"]
    try:
        check_config(compose_config([f"recipe={recipe}", *own, *overrides]), need_assets=False)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("Slices", ["trainer.compile=true"], "trainer.compile: Slices gathers weights in between"),
        ("Slices", ["trainer.precision=16-mixed"], "trainer.precision: Slices has no loss scale for 16-mixed."),
        ("Alone", ["launch.devices=2"], "strategy: Alone trains on one device, but 2 processes are started."),
        ("Silent", [], f"strategy: {__name__}.Silent does not say spans_processes. Inherit from vlm_train.training."),
    ],
)
def test_a_strategy_of_ones_own_is_judged(name: str, overrides: list[str], expected: str) -> None:
    (found,) = problems(name, *overrides)
    assert found.startswith(expected)


def test_a_strategy_of_ones_own_that_slices_takes_no_quantized_weights() -> None:
    (found,) = problems("Slices", "dry_run=true", recipe="llava15_qlora")
    assert found.startswith("strategy: Slices cuts every weight into slices, but 4-bit weights")
    assert problems("Slices") == problems("Alone") == []


@pytest.mark.parametrize("path", sorted((config_dir() / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_read_from_source_is_what_the_class_says(path: Path) -> None:
    cfg = compose_config(["recipe=llava15_stage1", f"strategy={path.stem}", "++strategy.nvme_path=/local"])
    strategy = resolve_key(cfg, "strategy")
    target = strategy.get("_target_")
    if target is None:  # auto
        return
    found = import_target(target)
    assert [read_attribute(target, name) for name in DECLARED] == [getattr(found, name) for name in DECLARED]
    built = found.__new__(found)
    vars(built).update(stage=strategy.get("stage"))
    assert shards_weights(strategy) == built.shards_model == (path.stem.startswith(("zero3", "fsdp2")))


def test_stages_of_zero_shard_as_they_are_told() -> None:
    for stage in (1, 2, 3):
        assert shards_weights({"_target_": ZERO, "stage": stage}) == (stage == 3)
    assert not shards_weights({"_target_": ZERO}) and not OwnState().shards_model
    assert ZeRO.clips_gradients and not FSDP2.clips_gradients


def test_what_a_class_does_not_say_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no sharded") as raised:
        read_attribute(ZERO, "sharded")
    assert raised.value.name == "sharded"
    with pytest.raises(UnknownTarget):
        read_attribute("vlm_train.training.strategies.zero.Zero", "sharded_by")
