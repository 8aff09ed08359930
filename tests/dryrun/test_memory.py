"""Predicted memory against the ZeRO paper's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vlm_train import config
from vlm_train.dryrun.memory import RUNTIME, RUNTIME_CPU, STRATEGIES, Needs, cheapest, peak
from vlm_train.dryrun.report import dry_run

NEEDS = Needs(
    parameters=1000, trainable=1000, largest_layer=0, states=2, precision="bf16-mixed", activations=0, logits=0
)


def needs(**changes: Any) -> Needs:
    return replace(NEEDS, **changes)


@pytest.mark.parametrize(
    ("strategy", "bytes_per_parameter"),
    # Rajbhandari et al. 2020, figure 1: (2 + 2 + 12) Psi, then optimizer, gradients and weights shared by N = 8.
    [("zero1", 2 + 2 + 12 / 8), ("zero2", 2 + 2 / 8 + 12 / 8), ("zero3", 16 / 8)],
)
def test_zero_follows_the_paper(strategy: str, bytes_per_parameter: float) -> None:
    found = peak(strategy, needs(), gpus=8)
    assert found.weights + found.gradients + found.optimizer == pytest.approx(1000 * bytes_per_parameter)
    assert found.total == found.weights + found.gradients + found.optimizer + RUNTIME


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_have_neither_gradient_nor_state(strategy: str) -> None:
    found = peak(strategy, needs(trainable=0), gpus=8)
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights > 0


def test_precision_decides_the_bytes() -> None:
    assert peak("single", needs(precision="32-true"), gpus=1).weights == 4000
    assert peak("single", needs(precision="bf16-true"), gpus=1).weights == 2000
    assert peak("single", needs(precision="bf16-true"), gpus=1).optimizer == 4000
    assert peak("single", needs(precision="bf16-mixed"), gpus=1).weights == 6000  # fp32 and autocast's copy


def test_sharding_gathers_layers() -> None:
    assert peak("zero3", needs(largest_layer=100), gpus=8).weights == 2000 / 8 + 2 * 2 * 100


def test_the_cheapest_that_fits_is_named() -> None:
    peaks = {name: peak(name, needs(), gpus=8) for name in STRATEGIES}
    assert cheapest(peaks, RUNTIME + 10**6, gpus=8) == "ddp"
    assert cheapest(peaks, RUNTIME + 10**6, gpus=1) == "single"
    assert cheapest(peaks, RUNTIME + 2000, gpus=8) == "zero3"
    assert cheapest(peaks, RUNTIME, gpus=8) is None


def test_the_columns_add_up_and_say_what_the_device_is(capsys: pytest.CaptureFixture[str]) -> None:
    for accelerator, device, runtime in (("cpu", "process", RUNTIME_CPU), ("gpu", "GPU", RUNTIME)):
        plan = dry_run(config.tiny("recipe=llava15_stage2", "dry_run=true", f"trainer.accelerator={accelerator}"))
        header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("GiB a "))
        names = header.removeprefix(f"GiB a {device}").split()
        assert names == ["weights", "gradients", "optimizer", "activations", "logits", "runtime", "peak", "fits"]
        for peaks in plan["memory"].values():
            assert sum(peaks[name] for name in names[:6]) == pytest.approx(peaks["total"])
            assert peaks["runtime"] == runtime
