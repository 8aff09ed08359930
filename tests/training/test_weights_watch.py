"""After the first update frozen weights are what they were, and what learns is not; rates of 0 prove nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import STRATEGIES
from vlm_train.errors import TrainingError
from vlm_train.training.params import Group, Policy
from vlm_train.training.weights_watch import LOOKS, PATIENCE, WeightsWatch, sum_bits

FROZEN = "vision.model.encoder.layers.0.mlp.fc1.weight"
TOUCH = f"+callbacks.touch={{_target_: tests.support.broken_weights.Touch, name: {FROZEN}, rank: %d}}"
HOLD = "+callbacks.hold={_target_: tests.support.broken_weights.Hold, part: connector}"
OWN = ["allow_targets=[tests.]", "trainer.export=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def make_watch(dtype: torch.dtype = torch.float32, width: int = 40) -> tuple[nn.ModuleDict, WeightsWatch]:
    """A frozen tower beside a connector and a head that learn."""
    model = nn.ModuleDict({name: nn.Linear(width, width, dtype=dtype) for name in ("tower", "connector", "head")})
    model["tower"].requires_grad_(False)
    groups = [Group(name, 1e-3, 0.0, list(model[name].parameters())) for name in ("connector", "head")]
    return model, WeightsWatch(model, Policy(groups, []), lambda values: values)


def move(part: nn.Module) -> None:
    with torch.no_grad():
        next(part.parameters())[0, 0] += 1e-3


def test_a_healthy_update_ends_the_watch() -> None:
    model, watch = make_watch()
    move(model["connector"])
    move(model["head"])
    watch.look_after_update({"connector": 1e-3, "head": 1e-3}, {"connector": 1.0, "head": 1.0})
    assert watch.done


@pytest.mark.parametrize("value", [1.0, float("nan"), 1e-7])
def test_a_frozen_weight_that_changed_is_named(value: float) -> None:
    model, watch = make_watch()
    with torch.no_grad():
        model["tower"].weight[3, 2] += value
    with pytest.raises(
        TrainingError, match=r"1 frozen weights changed .* tower\.weight\. .*trainer\.guard\.weights=false"
    ):
        watch.look_after_update({"connector": 0.0}, {})


def test_warm_up_from_zero_and_a_late_first_change_are_healthy() -> None:
    model, watch = make_watch()
    norms = {"connector": 1.0, "head": 1.0}
    for _ in range(3 * PATIENCE):
        watch.look_after_update({"connector": 0.0, "head": 0.0}, norms)
    for _ in range(3 * PATIENCE):  # too small for these weights
        watch.look_after_update({"connector": 1e-12, "head": 1e-12}, norms)
    move(model["connector"])
    move(model["head"])
    watch.look_after_update({"connector": 1e-8, "head": 1e-8}, norms)
    assert watch.done


def test_a_part_that_no_update_reaches_is_named() -> None:
    model, watch = make_watch()
    rates, norms = {"connector": 1e-3, "head": 1e-3}, {"connector": 1.0, "head": 1.0}
    move(model["head"])
    for _ in range(PATIENCE - 1):
        watch.look_after_update(rates, norms)
    with pytest.raises(
        TrainingError, match=f"connector learns, and gradients reach it, but none .* {PATIENCE} updates"
    ):
        watch.look_after_update(rates, norms)


@pytest.mark.parametrize(
    ("dtype", "rate", "norm"),
    [
        (torch.bfloat16, 1e-4, 1.0),  # norms of 1.0 feel 0.004
        (torch.float32, 1e-9, 1.0),  # the first rates of a long warm-up, or the last ones of a resumed run
        (torch.float32, 1e-3, 1e-12),  # below Adam's eps
    ],
)
@pytest.mark.parametrize("exact_copy", [False, True])
def test_updates_that_round_to_nothing_are_only_warned(
    dtype: torch.dtype, rate: float, norm: float, exact_copy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"connector": nn.RMSNorm(2000, dtype=dtype)})
    group = Group("connector", 1e-3, 0.0, list(model.parameters()))
    watch = WeightsWatch(model, Policy([group], []), lambda values: values, exact_copy=exact_copy)
    for _ in range(LOOKS):
        assert not watch.done and not capsys.readouterr().out
        watch.look_after_update({"connector": rate}, {"connector": norm})
    said = capsys.readouterr().out
    assert watch.done and ("too small for its precision" in said) is not exact_copy


def test_one_update_after_idle_ones_proves_nothing() -> None:
    model, watch = make_watch()
    rates = {"connector": 1e-3, "head": 1e-3}
    move(model["head"])
    watch.look_after_update(rates, {"head": 1.0, "connector": 1.0})
    for _ in range(2 * PATIENCE):
        watch.look_after_update(rates, {"head": 1.0})
    assert not watch.done
    move(model["connector"])
    watch.look_after_update(rates, {"head": 1.0, "connector": 1.0})
    assert watch.done


def test_a_part_with_a_rate_of_0_is_not_judged() -> None:
    model = nn.ModuleDict({"tower": nn.Linear(40, 40)})
    weight, bias = model["tower"].weight, model["tower"].bias
    watch = WeightsWatch(
        model, Policy([Group("tower", 0.0, 0.0, [weight]), Group("tower", 1e-3, 0.0, [bias])], []), lambda v: v
    )
    for _ in range(LOOKS):
        watch.look_after_update({"tower": 1e-3}, {"tower": 1.0})
    assert watch.done


@pytest.mark.parametrize("which", ["tower", "connector"])
def test_weights_on_a_disk_are_not_judged(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """ZeRO-3 with offload_parameters=nvme: read for a layer, and written back."""
    model = nn.ModuleDict({name: nn.Linear(40, 40) for name in ("tower", "connector")})
    model["tower"].requires_grad_(False)
    away: Any = model[which].weight
    away.ds_tensor = torch.zeros(0)
    away.ds_tensor.status = SimpleNamespace(name="NOT_AVAILABLE")
    parameters = [model["connector"].weight]
    watch = WeightsWatch(model, Policy([Group("connector", 1e-3, 0.0, parameters)], []), lambda values: values)
    move(model["connector"])
    away.ds_tensor = torch.ones(1600)  # in flight for the next step
    away.ds_tensor.status = SimpleNamespace(name="AVAILABLE")
    watch.look_after_update({"connector": 1e-3}, {"connector": 1.0})
    away.ds_tensor.status = SimpleNamespace(name="NOT_AVAILABLE")
    for _ in range(LOOKS):
        watch.look_after_update({"connector": 1e-3}, {"connector": 1.0})
    assert watch.done and not capsys.readouterr().out


def test_a_part_without_gradient_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Weight decay alone changes its weights."""
    model, watch = make_watch()
    for _ in range(PATIENCE):
        move(model["connector"])
        move(model["head"])
        watch.look_after_update({"connector": 1e-3, "head": 1e-3}, {"head": 1.0})
    assert watch.done
    said = capsys.readouterr().out
    assert said.count(f"connector learns (params.rules), but no gradient has reached it in {PATIENCE} updates") == 1


def test_single_tensors_may_stay() -> None:
    """LoRA's A, whose gradient is 0 while B is, or a layer that is not used."""
    model, watch = make_watch()
    for part in ("connector", "head"):
        with torch.no_grad():
            model[part].bias += 1.0
    watch.look_after_update({"connector": 1e-3, "head": 1e-3}, {"connector": 1.0, "head": 1.0})
    assert watch.done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_sum_of_bits_sees_the_last_bit(dtype: torch.dtype) -> None:
    tensor = nn.Parameter(torch.arange(1000).to(dtype), requires_grad=False)
    (before,) = sum_bits([tensor])
    assert sum_bits([tensor]) == [before]
    tensor.view(torch.uint8)[8] ^= 1
    assert sum_bits([tensor]) != [before]
    assert sum_bits([nn.Parameter(torch.zeros(0))]) == [0] and sum_bits([]) == []


def test_a_run_whose_frozen_weights_change_stops(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="1 frozen weights changed in the first update"):
        train(command(data, tmp_path, *OWN, TOUCH % 0))
    off = ["trainer.guard.weights=false", "trainer.max_steps=1"]
    train(command(data, tmp_path, *OWN, TOUCH % 0, *off, name="off"))


def test_a_run_that_does_not_learn_stops(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="connector learns, and gradients reach it, but none"):
        train(command(data, tmp_path, *OWN, HOLD, "trainer.max_steps=12", "trainer.save_every=null"))


def test_adapters_and_warm_up_pass(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = r"params.rules=[{match: '.*\.lora_.*', lr: 1e-3}, {match: '.*', lr: null}]"
    steps = ["lr_schedule.warmup_ratio=0.5", f"trainer.max_steps={PATIENCE + 2}"]
    train(command(data, tmp_path, *OWN, "peft=lora", rules, *steps))
    assert "no gradient" not in (said := capsys.readouterr().out) and "none of its weights changed" not in said


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_sees_both(strategy: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = [*OWN, *STRATEGIES[strategy], "batch.micro=1", "trainer.max_steps=11", "trainer.save_every=null"]
    train_on_ranks(command(data, tmp_path, *common, "trainer.max_steps=2", name="healthy"))
    for name, fault, said in (("touch", TOUCH % 1, "1 frozen weights changed"), ("hold", HOLD, "gradients reach it")):
        capfd.readouterr()
        codes = train_on_ranks(command(data, tmp_path, *common, fault, name=name), check=False)
        assert any(codes) and said in "".join(capfd.readouterr()), name


LORA = ["peft=lora", r"params.rules=[{match: '.*\.lora_.*', lr: 1e-3}, {match: '.*', lr: null}]"]
STILL = [r"params.rules=[{match: 'connector\..*', lr: 1e-3}, {match: 'llm\..*', lr: 0.0}, {match: '.*', lr: null}]"]
HEALTHY = {
    "lora-warm-up": [*LORA, "lr_schedule.warmup_ratio=0.5", f"trainer.max_steps={PATIENCE + 2}"],
    "rate-of-0": [*STILL, "trainer.max_steps=12"],
    "small-rates-in-16-bits": ["params=all", "optim.lr=1e-6", "trainer.precision=bf16-true", "trainer.max_steps=12"],
    "one-step": ["params=all", "trainer.max_steps=1"],
    "resumed": ["trainer.max_steps=2", "trainer.save_every=2", "trainer.val_every=2"],
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_healthy_runs_pass(strategy: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No alarm; the resumed run makes up for a validation first, after which FSDP2's root is whole."""
    common = [*OWN, *STRATEGIES[strategy], "batch.micro=1", "trainer.save_every=null"]
    train_on_ranks(*(command(data, tmp_path, *common, *own, name=name) for name, own in HEALTHY.items()))
    run = tmp_path / "resumed"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"val"' not in line))
    (run / "run.json").unlink()  # it is not done
    train_on_ranks(command(data, tmp_path, *common, *HEALTHY["resumed"], "trainer.max_steps=4", name="resumed"))
    said = "".join(capfd.readouterr())
    assert "resuming from" in said and '"val"' in (run / "metrics.jsonl").read_text()
    assert not any(alarm in said for alarm in ("frozen weights changed", "gradients reach it", "no gradient"))
