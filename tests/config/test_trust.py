"""The configuration of a run folder, which may be somebody else's, reads nothing of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.config.trust import check_environment_unread
from vlm_train.errors import ConfigError
from vlm_train.runs.single import from_run

TINY = ["recipe=llava15_stage2", "size=tiny", "init_from=[]"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    cfg = compose_config(TINY)
    cfg.data.train = [{"shards": "http://127.0.0.1:9/${oc.env:HF_TOKEN}/set"}]
    save_config(cfg, tmp_path / "config.yaml")
    return tmp_path


def test_a_run_folder_cannot_put_a_secret_into_an_address(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(ConfigError) as error:
        from_run([f"run={theirs}", "mode=show"], [])
    assert "data.train.0.shards: " in str(error.value) and "data.train.0.shards=<value>" in str(error.value)
    assert "hf_canary" not in str(error.value)


def test_the_command_line_may(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", "mine")
    cfg, _ = from_run([f"run={theirs}", "data.train=[{shards: '${oc.env:MY_DATA}'}]"], [])
    assert cfg.data.train[0].shards == "mine"


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:X}",
        "a/${oc.env:X,b}",
        "${ oc.env : X }",
        "${oc.decode:${oc.env:SLURM_JOB_NUM_NODES,1}}/x",
        "${oc.env:${a.name}}",
        "${${a.name}:X}",
    ],
)
def test_every_resolver_is_refused_however_it_is_spelled(value: str) -> None:
    cfg = OmegaConf.create({"a": {"name": "x", "list": [{"one": value}]}})
    with pytest.raises(ConfigError, match="a.list.0.one: the configuration in F reads the environment"):
        check_environment_unread("F", cfg)
    check_environment_unread("F", cfg, ["a.list"])


def test_references_and_numbers_of_processes_are_read() -> None:
    values = ["${a.name}/x:y", "http://h:1/${a.name}", "${oc.decode:${oc.env:SLURM_JOB_NUM_NODES,1}}", "${.name}", 3]
    check_environment_unread("F", OmegaConf.create({"a": {"name": "x", "list": values}}))


@pytest.mark.parametrize("launch", ["local", "srun", "torchrun"])
def test_what_we_write_ourselves_is_read(launch: str, tmp_path: Path) -> None:
    save_config(compose_config([*TINY, f"launch={launch}"]), tmp_path / "config.yaml")
    from_run([f"run={tmp_path}"], [])
