"""A run that is predicted not to fit on the devices that are here says so before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from tests.support.small_run import command, make_data
from vlm_train.build import build_model
from vlm_train.cli import main
from vlm_train.config.compose import compose_config
from vlm_train.dryrun import shortage
from vlm_train.dryrun.memory import GIB
from vlm_train.dryrun.report import without_assets

Model = tuple[DictConfig, Any]

UNPACKED = ("recipe=llava15_stage2", "data.pack=null", "batch.micro=16", "trainer.activation_checkpointing=full")


@pytest.fixture(scope="module")
def llava() -> Model:
    """LLaVA-1.5-7B, stage 2: 156 GiB of a GPU under DDP."""
    cfg, _ = without_assets(compose_config([*UNPACKED, "strategy=auto", "trainer.accelerator=auto"]))
    return cfg, build_model(cfg, meta=True)


@pytest.fixture
def said(llava: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def look(gib: float | None, *, gpus: int = 8, host: float | None = 1024, **changes: Any) -> str:
        monkeypatch.setattr(shortage, "read_device_memory", lambda: None if gib is None else gib * GIB)
        monkeypatch.setattr(shortage, "read_host_memory", lambda: None if host is None else host * GIB)
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))
        cfg = llava[0].copy()
        for key, value in changes.items():
            cfg[key] = value
        shortage.say_shortage(cfg, llava[1])
        return capsys.readouterr().out

    return look


def test_a_strategy_that_fits_is_named(said: Any) -> None:
    found = said(80)
    assert found.startswith(
        "warning: memory: this run is predicted to need 156 GiB of a GPU, which has 80 (strategy ddp"
    )
    assert "(strategy ddp, 16 rows of 2048 tokens at once)" in found and "Predicted to fit: strategy=zero1." in found
    assert found.count("\n") == 1
    assert said(160) == "", "all of it fits"


def test_what_to_change_is_named_where_no_strategy_fits(said: Any) -> None:
    found = said(80, gpus=1, host=64)
    assert "batch.micro=" in found and "peft=lora" in found and "dry_run=true" in found
    assert "Nothing that is known fits here" in said(1, gpus=1, host=4)


def test_a_cpu_shares_its_memory(said: Any) -> None:
    found = said(None, gpus=2, host=64)
    assert "a process (its share of this machine), which has 32" in found
    assert said(None, gpus=2, host=1024) == ""
    assert said(None, host=None) == "", "nothing says what there is"


def test_looking_changes_neither_model_nor_configuration(llava: Model, said: Any) -> None:
    before = llava[0].copy()
    said(80)
    assert llava[0] == before and {p.dtype for p in llava[1].parameters()} == {torch.float32}


def test_a_model_that_cannot_be_traced_trains_without_a_prediction(llava: Model, said: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("only on a Tuesday")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortage, "predict_memory", fail)
        assert said(80) == ""


def test_a_run_says_it_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    monkeypatch.setattr(shortage, "read_host_memory", lambda: 0.4 * GIB)
    assert main(command(data, tmp_path / "runs", "trainer.max_steps=1")) == 0
    printed = capsys.readouterr().out
    warning = printed.index("warning: memory: this run is predicted to need 0.5")
    assert warning < printed.index("first step: ") and printed.count("warning: memory") == 1
    monkeypatch.setattr(shortage, "read_host_memory", lambda: 16 * GIB)
    assert main(command(data, tmp_path / "runs", "trainer.max_steps=1", name="roomy")) == 0
    assert "warning: memory" not in capsys.readouterr().out


def test_a_machine_has_some_memory() -> None:
    here = shortage.read_host_memory()
    assert here is None or here > GIB
