"""The folder of a run: what a training that begins anew takes away."""

from __future__ import annotations

from pathlib import Path

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
