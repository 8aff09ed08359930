"""Blocks inserted into a language model train alike under every strategy, also where a rank has no pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import SGD, STRATEGIES, assert_equal_runs

RULES = r"params.rules=[{match: '(blocks|connector)\..*', lr: 0.05}, {match: '.*', lr: null}]"


def job(data: Path, runs: Path, name: str, *more: str, micro: int) -> list[str]:
    own = [*SGD, "batch.samples=2", f"batch.micro={micro}", "data.shuffle=none", "trainer.max_steps=4", RULES]
    own += ["trainer.export=false", "trainer.val_every=2", "allow_targets=[tests.]"]
    own += ["model._target_=tests.support.gated.GatedVLM", "+model.gate=0.5", "trainer.activation_checkpointing=full"]
    return command(data, runs, *own, *more, name=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), text_only=True)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, whose batches hold pictures and text alone, without activation checkpointing."""
    more = ["trainer.activation_checkpointing=none"]
    return train(job(data, tmp_path_factory.mktemp("alone"), "alone", *more, micro=2))


def test_only_the_blocks_and_the_connector_learn(alone: Path) -> None:
    last = (alone / "checkpoints/LATEST").read_text().strip()
    weights = load_file(alone / "checkpoints" / last / "weights.safetensors")
    assert {name.split(".")[0] for name in weights} == {"blocks", "connector"}
    first = load_file(alone / "checkpoints" / "step-00000002" / "weights.safetensors")
    assert (weights["blocks.0.key.weight"] != first["blocks.0.key.weight"]).any()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s == "fsdp2" else pytest.mark.slow) for s in STRATEGIES]
)
def test_one_rank_has_text_only(strategy: str, data: Path, alone: Path, tmp_path: Path) -> None:
    train_on_ranks(job(data, tmp_path, strategy, *STRATEGIES[strategy], micro=1))
    assert_equal_runs(alone, tmp_path / strategy)
