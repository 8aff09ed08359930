"""A preference objective with a reference model, under every strategy: equal to DDP, exact on resume, never saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import ADAMW, SGD, STRATEGIES, assert_equal_runs
from tests.training.strategies.test_resume import STOP, assert_same_end
from vlm_train.errors import ConfigError

PREFERENCE = [
    "~objective.lm", "+objective.preference._target_=tests.contracts.preference.Preference", "allow_targets=[tests.]",
    "data.rejected=true", "reference.model=start", "trainer.export=false", "batch.normalize=token",
]  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("preferences"), rejected=True)


def job(strategy: str, data: Path, runs: Path, name: str, *more: str) -> list[str]:
    own = [*STRATEGIES[strategy], *PREFERENCE, "params=all", "batch.micro=1", f"data.cache={runs}/lengths"]
    return command(data, runs, *own, *more, name=name)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_one_process_learns_and_saves_no_reference(data: Path, tmp_path: Path) -> None:
    common = [*PREFERENCE, *SGD, "params=all", "trainer.log_every=1", f"data.cache={tmp_path}/lengths"]
    whole = train(command(data, tmp_path, *common, "batch.micro=4", name="whole"))
    found = losses(whole)
    assert found[0] == pytest.approx(0.6931, abs=1e-4) and found[-1] < found[0]  # the reference is the model at first
    with safe_open(whole / "checkpoints/step-00000006/weights.safetensors", "pt") as file:
        assert not any("reference" in name for name in file.keys())  # noqa: SIM118
    assert json.loads((whole / "checkpoints/step-00000006/manifest.json").read_text())["reference"] == []
    assert_equal_runs(whole, train(command(data, tmp_path, *common, "batch.micro=1", name="cut")))
    assert_equal_runs(whole, train(command(data, tmp_path, *common, "batch.micro=4", "data.pack=256", name="packed")))
    teacher = [f"reference.model={whole}", "batch.micro=4", "trainer.max_steps=2"]
    taught = train(command(data, tmp_path, *common, *teacher, name="taught"))
    assert losses(taught)[0] != pytest.approx(0.6931, abs=1e-4)  # it starts elsewhere than the teacher ended


def test_adapters_are_their_own_reference(data: Path, tmp_path: Path) -> None:
    common = [*PREFERENCE, "peft=lora", "batch.micro=2", "optim.lr=0.01", "trainer.log_every=1"]
    adapters = "params.rules=[{match: '.*lora_.*', lr: 0.01}, {match: '.*', lr: null}]"
    off = train(command(data, tmp_path, *common, adapters, name="off"))
    assert losses(off)[0] == pytest.approx(0.6931, abs=1e-4) and losses(off)[-1] < losses(off)[0]
    copied = train(command(data, tmp_path, *common, adapters, "reference.init_from=[]", name="copied"))
    assert_equal_runs(off, copied)
    with pytest.raises(ConfigError, match="reference.model: the model with its adapters off is not a reference"):
        train(command(data, tmp_path, *common, "params=all", name="refused"))


@pytest.fixture(scope="session")
def ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("ddp")
    train_on_ranks(job("ddp", data, runs, "plain", *SGD), job("ddp", data, runs, "packed", *SGD, "data.pack=256"))
    return runs


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_strategy_computes_what_ddp_does(strategy: str, data: Path, ddp: Path, tmp_path: Path) -> None:
    plain, packed = (job(strategy, data, tmp_path, name, *SGD) for name in ("plain", "packed"))
    train_on_ranks(plain, [*packed, "data.pack=256"])
    for name in ("plain", "packed"):
        assert_equal_runs(ddp / name, tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_resumed_run_ends_as_one_that_was_not(strategy: str, data: Path, tmp_path: Path) -> None:
    whole, cut = (job(strategy, data, tmp_path, name, *ADAMW) for name in ("whole", "cut"))
    train_on_ranks(whole, [*cut, STOP.format(3)], cut)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
