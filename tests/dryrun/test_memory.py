"""Predicted memory against the ZeRO paper's own arithmetic, DeepSpeed's estimator, and counted tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vlm_train.config.compose import compose_tiny
from vlm_train.dryrun.memory import (
    ALLGATHER_BUCKET,
    GIB,
    LIVE_PARAMETERS,
    NF4,
    REDUCE_BUCKET,
    RUNTIME,
    RUNTIME_CPU,
    STRATEGIES,
    Hardware,
    MemoryNeeds,
    find_cheapest,
    list_runnable,
    list_sensible,
    predict_peak,
)
from vlm_train.dryrun.report import dry_run

NEEDS = MemoryNeeds(
    parameters=1000, trainable=1000, largest_layer=0, states=2, precision="bf16-mixed", activations=0, logits=0
)
OFFLOADING = [name for name, spec in STRATEGIES.items() if spec.offloads]


def needs(**changes: Any) -> MemoryNeeds:
    return replace(NEEDS, **changes)


def on(gpus: int, **changes: Any) -> Hardware:
    return Hardware(gpus=gpus, memory=math.inf, **changes)


@pytest.mark.parametrize(
    ("strategy", "bytes_per_parameter"),
    # Rajbhandari et al. 2020, figure 1: (2 + 2 + 12) Psi, then optimizer, gradients and weights shared by N = 8.
    [("zero1", 2 + 2 + 12 / 8), ("zero2", 2 + 2 / 8 + 12 / 8), ("zero3", 16 / 8)],
)
def test_zero_follows_the_paper(strategy: str, bytes_per_parameter: float) -> None:
    found = predict_peak(strategy, needs(), on(8))
    assert found.states == pytest.approx(1000 * bytes_per_parameter)
    assert found.total == found.states + found.buffers + RUNTIME


def test_the_published_example_comes_out() -> None:
    """Figure 1 of the ZeRO paper: model states of 7.5B parameters with Adam, on 64 GPUs, in units of 10^9 bytes."""
    published = needs(parameters=7_500_000_000, trainable=7_500_000_000)
    assert predict_peak("zero1", published, on(1)).states == 120e9
    for strategy, figure in (("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)):
        assert round(predict_peak(strategy, published, on(64)).states / 1e9, 1) == figure


@pytest.mark.parametrize(("strategy", "estimated"), [("zero3_offload", 71.705), ("zero2_offload", 63.738)])
def test_offload_is_what_deepspeed_estimates(strategy: str, estimated: float) -> None:
    """GiB of CPU by `estimate_zero3_model_states_mem_needs` of DeepSpeed 0.19.8, run for this count, a node of 8 and
    `zero_init`; the second with weights on the GPU, where ZeRO-2's optimizer takes the same."""
    count = 2_851_598_336
    assert predict_peak(strategy, needs(parameters=count, trainable=count), on(8)).cpu / GIB == pytest.approx(
        estimated, 1e-4
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_have_neither_gradient_nor_state(strategy: str) -> None:
    found = predict_peak(strategy, needs(trainable=0, accumulates=True), on(8))
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights + found.cpu + found.nvme > 0


def test_precision_decides_the_bytes() -> None:
    assert predict_peak("single", needs(precision="32-true"), on(1)).weights == 4000
    assert predict_peak("single", needs(precision="bf16-true"), on(1)).weights == 2000
    assert predict_peak("single", needs(precision="bf16-true"), on(1)).optimizer == 4000
    mixed = predict_peak("single", needs(precision="bf16-mixed"), on(1))
    assert (mixed.weights, mixed.buffers) == (4000, 4000), "fp32; autocast's copy, and then the update's temporaries"
    assert predict_peak("single", needs(precision="bf16-mixed", states=0), on(1)).buffers == 2000
    assert predict_peak("single", needs(precision="32-true", fused=True), on(1)).buffers == 0, "one kernel needs none"
    assert predict_peak("single", needs(precision="bf16-mixed", halved=600), on(1)).weights == 2 * 600 + 4 * 400


def test_sharding_gathers_layers_and_reduces_buckets() -> None:
    found = predict_peak("zero3", needs(largest_layer=100), on(8))
    assert (found.weights, found.buffers) == (2000 / 8, 2 * (REDUCE_BUCKET + 1000))
    huge = needs(parameters=10**10, trainable=0)
    assert predict_peak("zero3", huge, on(8)).buffers == 2 * (REDUCE_BUCKET + LIVE_PARAMETERS)
    assert predict_peak("zero2", huge, on(8)).buffers == 2 * 2 * REDUCE_BUCKET
    layers = needs(largest_layer=100, outside=50, trainable=1000, precision="32-true")
    assert predict_peak("fsdp2", layers, on(8)).buffers == 4 * (2 * 100 + 50) + (4 + 4) * 100
    assert predict_peak("ddp", needs(precision="32-true"), on(8)).buffers == 4 * 1000, "a copy of the gradients"


def test_the_update_uses_what_activations_leave_free() -> None:
    many = needs(parameters=10**9, trainable=10**9)
    update = 8 * 10**9 / 8 + 2 * ALLGATHER_BUCKET  # fp32 gradients and Adam's temporaries, and gathered weights
    assert predict_peak("zero2", many, on(8)).buffers == update
    assert predict_peak("zero2", replace(many, activations=400_000_000), on(8)).buffers == update - 400_000_000
    assert predict_peak("zero2", replace(many, activations=10**10), on(8)).buffers == 4 * REDUCE_BUCKET


@pytest.mark.parametrize("strategy", OFFLOADING)
def test_offload_takes_states_from_the_gpu_to_its_node(strategy: str) -> None:
    many = needs(parameters=10**9, trainable=10**9)
    kept, moved = predict_peak(strategy.split("_")[0], many, on(8)), predict_peak(strategy, many, on(8))
    assert moved.states < kept.states and moved.optimizer == 0
    assert moved.cpu > 0 and (moved.nvme > 0) == strategy.endswith("nvme")
    two_nodes = predict_peak(strategy, many, on(8, gpus_per_node=4))
    assert two_nodes.cpu == pytest.approx(moved.cpu / 2) and two_nodes.nvme == pytest.approx(moved.nvme / 2)


def test_accumulated_gradients_are_kept_whole_by_zero2_on_the_cpu() -> None:
    once, several = (predict_peak("zero2_offload", needs(accumulates=more), on(8)) for more in (False, True))
    assert several.cpu - once.cpu == 1.5 * 8 * 2 * 1000


def test_quantized_weights_are_smaller_and_not_sharded() -> None:
    some = needs(trainable=0, quantized=800, quantized_bytes=800 * NF4, precision="bf16-true")
    assert pytest.approx(0.516, abs=1e-3) == NF4
    assert predict_peak("ddp", some, on(8)).weights == pytest.approx(2 * 200 + 800 * NF4)
    assert list_runnable(some, on(8)) == ["ddp", "zero1", "zero2", "zero1_offload", "zero2_offload"]


def test_the_cheapest_that_fits_is_named() -> None:
    small = needs(parameters=10**10, trainable=10**10, largest_layer=2 * 10**9)
    peaks = {name: predict_peak(name, small, on(8)) for name in STRATEGIES if name != "single"}
    room = {name: replace(on(8), memory=one.total, cpu=one.cpu) for name, one in peaks.items()}
    assert find_cheapest(peaks, room["ddp"]) == "ddp"
    assert find_cheapest(peaks, replace(room["zero2"], memory=peaks["zero2"].total)) == "zero2"
    assert find_cheapest(peaks, room["zero3_nvme"]) == "zero3_nvme"
    assert find_cheapest(peaks, replace(room["zero3_nvme"], cpu=0)) is None, "the CPU's memory counts"
    assert find_cheapest(peaks, replace(on(8), memory=RUNTIME)) is None


def test_one_gpu_shares_with_nobody() -> None:
    assert list_sensible(NEEDS, on(1), offload=False) == ["single", "zero1"]
    assert list_sensible(NEEDS, on(2), offload=False) == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert list_sensible(NEEDS, on(2), offload=True)[5:] == OFFLOADING


def test_plain_training_holds_what_is_predicted() -> None:
    """Counted tensors of a model with a frozen half, after a step of AdamW."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    states = [value for one in optimizer.state.values() for value in one.values() if value.ndim]
    found = predict_peak("single", needs(parameters=2 * 4160, trainable=4160, precision="32-true"), on(1))
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in learned)
    assert found.optimizer == sum(value.nbytes for value in states)


def test_the_columns_add_up_and_say_what_the_device_is(capsys: pytest.CaptureFixture[str]) -> None:
    for accelerator, device, runtime in (("cpu", "process", RUNTIME_CPU), ("gpu", "GPU", RUNTIME)):
        plan = dry_run(compose_tiny("recipe=llava15_stage2", "dry_run=true", f"trainer.accelerator={accelerator}"))
        printed = capsys.readouterr().out
        header = next(line for line in printed.splitlines() if line.startswith("GiB a "))
        names = header.removeprefix(f"GiB a {device}").split()
        columns = ["weights", "gradients", "optimizer", "buffers", "activations", "logits", "runtime"]
        assert names == [*columns, "peak", *(["CPU", "NVMe"] if accelerator == "gpu" else []), "fits"]
        assert all(("offload" in line) == (accelerator == "gpu") for line in printed.splitlines() if "_offload" in line)
        for peaks in plan["memory"].values():
            assert sum(peaks[name] for name in columns) == pytest.approx(peaks["total"])
            assert peaks["runtime"] == runtime
