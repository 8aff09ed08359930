"""Finds the checkpoint from which a run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_train.checkpoint.files import FORMAT, STATE, verify_checkpoint
from vlm_train.distributed import say_once
from vlm_train.errors import CheckpointError
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.rollback import is_stale, read_rollbacks


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint that a run goes on from."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def state(self) -> Path:
        """Step, schedule, counters: see `run_state`."""
        return self.folder / STATE

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def require_same_data(self, **facts: Any) -> None:
        """Raises CheckpointError where the run's data, vocabulary or first weights are not those of the checkpoint."""
        for name, value in facts.items():
            if name in self.manifest and self.manifest[name] != value:
                raise CheckpointError(
                    f"{name} changed since {self.folder} was written ({self.manifest[name]} -> {value}). Restore it, "
                    "or start another run (run_name=...) from these weights (init_from)."
                )


def newest_valid(root: Path) -> Resume | None:
    """The newest undamaged checkpoint that no rollback has taken back; damaged ones are skipped aloud.

    None if there never was one. Raises CheckpointError when there are checkpoints, but none is valid.
    """
    problems, made = [], read_rollbacks(root.parent)
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            found = Resume(folder, verify_checkpoint(folder))
            if not is_stale(found.manifest, made):
                return found
            problems.append(f"{folder}: taken back by a rollback")
        except CheckpointError as error:
            problems.append(str(error))
            say_once(f"resume: skipping {error}")
    if problems:
        raise CheckpointError(
            "no valid checkpoint to resume from: " + "; ".join(problems) + ". resume=never needs another run_name."
        )
    return None


def find_resume(resume: str, folder: Path, run_id: str) -> Resume | None:
    """What to resume from: this run's own (`auto`), a given checkpoint of this run, or nothing (`never`, `restart`).

    Raises:
        CheckpointError: damaged, of another run, without an optimizer's state, or `never` with checkpoints there.
    """
    root = RunFolder(folder).checkpoints
    if resume == "never":
        if any(root.glob("step-*")):
            raise CheckpointError(
                f"resume=never, but {root} holds checkpoints. Choose another run_name, or delete the folder."
            )
        return None
    if resume == "restart":
        return None
    if resume != "auto" and RunFolder(resume).checkpoints.is_dir():
        raise CheckpointError(f"resume: {resume} is a run; give one of its checkpoints, {resume}/checkpoints/step-...")
    found = newest_valid(root) if resume == "auto" else Resume(Path(resume), verify_checkpoint(Path(resume)))
    if found is None:
        return None
    if found.manifest["run_id"] != run_id:
        raise CheckpointError(
            f"resume: {found.folder} belongs to run {found.manifest['run_id']!r}, this is {run_id!r}. "
            "To start from its weights use init_from."
        )
    if found.manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"resume: {found.folder} is of format {found.manifest.get('format')}, this version resumes {FORMAT}. "
            "To start from its weights use init_from."
        )
    if not found.state.is_file():
        raise CheckpointError(f"resume: {found.folder} holds weights only. To start from them use init_from.")
    return found
