"""The folder of a run: every path in it has its name here, and only here."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vlm_train.errors import ConfigError


class RunFolder:
    """The paths of a run's folder.

    config.yaml, config_origins.txt     what was asked for, and where each value came from
    run.json, params.json               how it went, and what learned
    metrics.jsonl                       every log line
    checkpoints/                        see `vlm_train.checkpoint.files`
    rollbacks.json                      returns to an earlier checkpoint
    quarantine-*.jsonl                  bad samples, one file a rank
    skipped-steps-*.jsonl               steps without an update, one file a rank
    stacks-*.txt                        where each rank stood when the watchdog ended it
    tokenizer/                          the tokenizer of the run
    predictions/                        answers of a validation, step-*.json
    output.log                          what its process printed where there is no terminal
    eval/, export/, report.html         results: evaluations, the exported model, the page
    schedule.json                       of a schedule's folder: its stages and their runs
    .lock                               held by the process that trains it
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.origins = self.path / "config.yaml", self.path / "config_origins.txt"
        self.record, self.parameters = self.path / "run.json", self.path / "params.json"
        self.metrics, self.rollbacks = self.path / "metrics.jsonl", self.path / "rollbacks.json"
        self.checkpoints, self.tokenizer = self.path / "checkpoints", self.path / "tokenizer"
        self.evaluation, self.export, self.report = self.path / "eval", self.path / "export", self.path / "report.html"
        self.predictions, self.output = self.path / "predictions", self.path / "output.log"
        self.schedule, self.lock = self.path / "schedule.json", self.path / ".lock"

    def quarantine_file(self, rank: int | str = "*") -> Path:
        """The file of a rank's bad samples; without a rank, the pattern of all of them. So are the next two."""
        return self.path / f"quarantine-{rank}.jsonl"

    def skipped_steps_file(self, rank: int | str = "*") -> Path:
        """The file of a rank's steps without an update."""
        return self.path / f"skipped-steps-{rank}.jsonl"

    def stacks_file(self, rank: int | str = "*") -> Path:
        """The file of a rank's stacks."""
        return self.path / f"stacks-{rank}.txt"

    def remove_training(self) -> None:
        """Remove what an earlier training of the run has left and a new one would take for its own. The exported model
        stays until the new one replaces it."""
        for folder in (self.checkpoints, self.evaluation, self.predictions):
            shutil.rmtree(folder, ignore_errors=True)
        self.rollbacks.unlink(missing_ok=True)
        for pattern in (self.quarantine_file(), self.skipped_steps_file(), self.stacks_file()):
            for file in self.path.glob(pattern.name):
                file.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raises ConfigError before work whose results would find no place in the folder of a run."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}), and results go there. Copy the run's folder to where "
            "they can, and name the copy, run=<folder>."
        ) from error
