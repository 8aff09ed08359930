"""Whether a job script starts a run again: `python -m vlm_train.runs.slurm_requeue <folder> <exit code>` says yes by
exit code 0.

A run that was preempted, or failed, goes on from its newest checkpoint. One that fails again and again without a new
checkpoint does not: a requeue loop would only burn hours.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_train.errors import REFUSED, exit_code
from vlm_train.runs import record

FRUITLESS = 2
"""Allowed restarts in a row without a new checkpoint."""

RECORD = "restarts.json"


def decide_restart(folder: Path, code: int, *, first: bool) -> tuple[bool, str]:
    """Whether to start again what ended with `code`, and why. Remembers in `<folder>/restarts.json` what it found.

    Args:
        folder: a run folder, or one that holds the runs of this job alone.
        first: this was the first attempt, so earlier jobs do not count.
    """
    if code == 0:
        return False, "done"
    if code == REFUSED:
        return False, "a setting is wrong, which another start does not change"
    if code == exit_code(signal.SIGINT):
        return False, "somebody pressed Ctrl-C"
    pointers = [*folder.glob("checkpoints/LATEST"), *folder.glob("*/checkpoints/LATEST")]
    named = {str(path.relative_to(folder)): path.read_bytes() for path in pointers}
    newest = {name: content.decode(errors="replace").strip() for name, content in named.items()}
    held = {} if first else record.read_json(folder / RECORD)
    before = held.get("fruitless")
    fruitless = 0 if newest != held.get("newest", {}) else (before if isinstance(before, int) else 0) + 1
    record.write_json(folder / RECORD, {"newest": newest, "fruitless": fruitless})
    if fruitless > FRUITLESS:
        return False, f"{fruitless} attempts in a row have ended without a new checkpoint"
    return True, "it goes on from its newest checkpoint" if newest else "there is no checkpoint yet"


def main(argv: Sequence[str]) -> int:
    """Prints the decision; 0: start again."""
    folder, code = Path(argv[0]), int(argv[1])
    again, why = decide_restart(folder, code, first=os.environ.get("SLURM_RESTART_COUNT", "0") == "0")
    print(f"Exit code {code}: {'starting again' if again else 'not starting again'}, {why}.")
    return 0 if again else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
