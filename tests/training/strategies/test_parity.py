"""Every strategy computes what DDP computes: losses, norms, weights; whatever clips, accumulates, optimises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.slow import run_few
from tests.support.small_run import command, make_data

STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "zero1": ["strategy=zero1"],
    "zero2": ["strategy=zero2"],
    "zero3": ["strategy=zero3", "strategy.persistent_parameters=0"],  # else the tiny model stays whole
    "fsdp2": ["strategy=fsdp2"],
}

SGD = ["optim=sgd", "~optim.betas", "optim.lr=0.05"]
ADAMW = ["optim.eps=1e-4"]  # a usual one blows up differences of the last bit

CASES = {
    "sgd": [*SGD, "batch.micro=2", "trainer.max_grad_norm=null"],
    "sgd-accumulated-clipped": [*SGD, "batch.micro=1", "trainer.max_grad_norm=0.5"],
    "adamw-accumulated": [*ADAMW, "batch.micro=1", "trainer.max_grad_norm=null"],
    "adamw-clipped": [*ADAMW, "batch.micro=2", "trainer.max_grad_norm=0.5"],
}


def jobs(strategy: str, data: Path, runs: Path, *more: str) -> list[list[str]]:
    common = [*STRATEGIES[strategy], "params=all", "trainer.max_steps=3", "trainer.export=false", *more]
    return [command(data, runs, *common, *case, name=f"{strategy}-{name}") for name, case in CASES.items()]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses, norms and weights to tolerance."""
    for row, same in zip(log(one), log(other), strict=True):
        assert (row["step"], row["split"]) == (same["step"], same["split"])
        keys = {key for key in row if key == "loss" or key.startswith("grad_norm")}
        assert keys <= set(same)
        for key in keys:
            assert same[key] == pytest.approx(row[key], rel=1e-5), (key, row["step"])
    last = (one / "checkpoints/LATEST").read_text().strip()
    weights, others = (load_file(run / "checkpoints" / last / "weights.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= 1e-5 * tensor.abs().max() + 1e-8, name


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("ddp")
    train_on_ranks(*jobs("ddp", data, runs))
    return runs


@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", run_few([name for name in STRATEGIES if name != "ddp"], ("zero3",)))
def test_a_strategy_computes_what_ddp_does(strategy: str, data: Path, ddp: Path, tmp_path: Path) -> None:
    train_on_ranks(*jobs(strategy, data, tmp_path))
    for case in CASES:
        assert_equal_runs(ddp / f"ddp-{case}", tmp_path / f"{strategy}-{case}")
    norms = [row["grad_norm"] for row in log(tmp_path / f"{strategy}-adamw-clipped") if row["split"] == "train"]
    assert min(norms) > 0.5 and all(torch.isfinite(torch.tensor(norms)))  # clipping did something
