"""The folder of a run: what a training that begins anew takes away, and that results find a place."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.errors import ConfigError
from vlm_train.evaluation.run import evaluate_run
from vlm_train.export.run import export_run
from vlm_train.runs import folder as run_folder
from vlm_train.runs.folder import RunFolder


def test_a_new_training_finds_nothing_of_the_old_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for folder in (run.checkpoints, run.evaluation, run.predictions, run.export):
        folder.mkdir()
    kept = [run.config, run.output, run.export / "config.json"]
    gone = [run.predictions / "step-2.json", run.rollbacks]
    gone += [
        file
        for rank in (0, 1)
        for file in (run.quarantine_file(rank), run.skipped_steps_file(rank), run.stacks_file(rank))
    ]
    for file in (*kept, *gone):
        file.write_text("{}", encoding="utf-8")
    run.remove_training()
    assert all(file.exists() for file in kept)
    assert not any(path.exists() for path in (*gone, run.checkpoints, run.evaluation, run.predictions))
    run.remove_training()  # nothing is left to remove


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    cfg = compose_config(["recipe=easyvqa_stage2", "size=tiny", "eval=easyvqa", f"mode={mode}"])
    save_config(cfg, tmp_path / "config.yaml")
    cfg.run = str(tmp_path)
    run_folder.require_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "the look leaves nothing"
    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\), and results go there"):
        {"eval": evaluate_run, "export": export_run}[mode](cfg)
