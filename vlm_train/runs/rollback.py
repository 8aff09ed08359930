"""Going back: from steps that fail in a row to the checkpoint before them, leaving out the data of all steps since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_train.errors import CheckpointError
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder


@dataclass(frozen=True)
class Rollback:
    """A run went back to the checkpoint of step `to`; the data of steps `to` + 1 to `last` makes no update."""

    to: int
    last: int


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. Raises CheckpointError where the file is damaged."""
    path = RunFolder(folder).rollbacks
    if not path.exists():
        return []
    try:
        return [Rollback(int(one["to"]), int(one["last"])) for one in record.read_json(path)["made"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: is damaged, and says which steps were taken back. Restore it; without the file no step counts as "
            "taken back."
        ) from error


def go_back(folder: Path, first: int, last: int) -> Rollback | None:
    """Let the run in `folder` go on from the newest checkpoint before step `first` when it is started again.

    Returns None, and changes nothing, where there is none.
    """
    made = read_rollbacks(folder)
    steps = [int(path.name.removeprefix("step-")) for path in RunFolder(folder).checkpoints.glob("step-*")]
    earlier = [step for step in steps if step < first]
    if not earlier:
        return None
    new = Rollback(max(earlier), last)
    record.write_json(RunFolder(folder).rollbacks, {"made": [asdict(one) for one in [*made, new]]})
    return new


def is_stale(manifest: Mapping[str, Any], made: list[Rollback]) -> bool:
    """Whether a checkpoint holds steps that a later rollback has taken back."""
    return any(one.to < int(manifest["step"]) for one in made[int(manifest.get("rollbacks", 0)) :])
