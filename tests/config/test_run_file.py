"""The configuration file of a run: damaged ones are named with what to do, and runs may be moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import load_config, load_run, save_config
from vlm_train.errors import ConfigError
from vlm_train.runs import launch

RECIPE = "recipe=llava15_stage2"


def damage(text: str, how: str) -> bytes:
    """The file's content, damaged."""
    return {
        "empty": b"",
        "zeros": b"\0" * 500,
        "half": text[: len(text) // 2].encode(),
        "whole lines of it": "".join(text.splitlines(keepends=True)[:90]).encode(),
        "a list": b"- 1\n",
        "no UTF-8": b"\xff\xfe\x00mode: fit\n",
        "nested": b"[" * 100_000,
    }[how]


@pytest.mark.parametrize("how", ["empty", "zeros", "half", "whole lines of it", "a list", "no UTF-8", "nested"])
def test_a_damaged_configuration_is_named(how: str, tmp_path: Path) -> None:
    cfg = compose_config([RECIPE, "run_name=x", f"paths.runs={tmp_path}"])
    folder = launch.prepare_folder(cfg, "origins")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_bytes(damage(path.read_text(), how))
    with pytest.raises(ConfigError) as caught:
        launch.prepare_folder(cfg, "origins")
    (said,) = caught.value.problems
    assert said.startswith(f"{path}: ") and len(said.splitlines()) == 1 and "another configuration" not in said
    path.unlink()
    assert launch.prepare_folder(cfg, "origins") == folder, "what the message says"
    assert load_config(path) == cfg


@pytest.mark.parametrize("written", ["${paths.runs}/first", "runs/first", "runs/first/checkpoints/step-00000003"])
def test_a_moved_run_finds_the_run_that_it_started_from_beside_it(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "checkpoints" / "step-00000003").mkdir(parents=True)
    cfg = compose_config([RECIPE, f"init_from=[{{run: '{written}'}}]", "run_name=second"])
    save_config(cfg, tmp_path / "runs" / "second" / "config.yaml")
    assert load_run(tmp_path / "runs" / "second") == cfg, "where nothing was moved, nothing changes"
    shutil.move(tmp_path / "runs", tmp_path / "kept")
    (source,) = load_run(tmp_path / "kept" / "second").init_from
    inside = written.partition("first")[2]
    assert source.run == f"{tmp_path}/kept/first{inside}" and Path(source.run).is_dir()
