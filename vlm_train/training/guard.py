"""Whether an update is made: not with gradients that are no numbers, nor, if wanted, far larger than usual."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vlm_train.errors import TrainingError
from vlm_train.loggers.jsonl_writer import JsonlWriter
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.rollback import go_back, read_rollbacks

ON_DEMAND, SCALE = "trainer.skip_steps", "overflow, for which the loss scale changes"
"""Why an update is left out although nothing is wrong."""

SEARCH = 24
"""Halvings of the loss scale in a row that are a search for it: from 2^16, where it starts, to 2^-8."""


class Guard:
    """Judges the gradient norm of every step, which is the same on all ranks, and bears a number of bad ones.

    The data of a step that is left out counts as seen; its schedule step is not taken.

    Args:
        spike: how many median absolute deviations above the median of the last `window` norms are too many; None: any
            finite norm is fine.
        window: norms remembered; no spike is called before it is full.
        max_in_a_row: allowed skipped steps in a row; one more stops the run.
        rollback: how often the run is prepared for going on from the checkpoint before such steps.
        scaled: a loss scaler looks for its scale by letting gradients overflow, which is no fault.
        skip: [first, last] of steps that are left out whatever their norm.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spike: float | None = None,
        window: int = 100,
        max_in_a_row: int = 10,
        rollback: int = 0,
        scaled: bool = False,
        skip: Sequence[Sequence[int]] = (),
    ) -> None:
        self.path, self.spike, self.max_in_a_row, self.scaled = folder, spike, max_in_a_row, scaled
        made = read_rollbacks(folder)
        self.skip = [*skip, *([one.to + 1, one.last] for one in made)]
        self.rollback, self.rolled_back = rollback, len(made)
        self.norms: deque[float] = deque(maxlen=window)
        self.in_a_row = self.overflows = 0

    def reason_to_skip(self, norm: float, step: int = 0) -> str | None:
        """Why the update of a step is left out; None: it is made. The same on every rank."""
        if self.is_told_to_skip(step):
            return ON_DEMAND
        if not math.isfinite(norm):
            self.overflows += 1
            return SCALE if self.scaled and self.overflows <= SEARCH else f"gradient norm {norm}"
        self.overflows = 0
        if self.spike is not None and len(self.norms) == self.norms.maxlen:
            usual = median(self.norms)
            deviation = median(abs(one - usual) for one in self.norms)
            if norm > usual + self.spike * max(deviation, 0.05 * usual):  # norms that hardly vary leave room too
                return f"gradient norm {norm:.4g}, usual {usual:.4g} +- {deviation:.2g}"
        self.norms.append(norm)
        self.in_a_row = 0
        return None

    def is_told_to_skip(self, step: int) -> bool:
        """Whether a step makes no update whatever its norm."""
        return any(first <= step <= last for first, last in self.skip)

    def leave_out(self, step: int, reason: str, keys: list[str], rank: int) -> None:
        """Record a step without update. Raises TrainingError, on every rank, when it is one too many."""
        if reason in (ON_DEMAND, SCALE):
            return
        self.in_a_row += 1
        line = {"step": step, "reason": reason, "samples": keys}
        JsonlWriter(RunFolder(self.path).skipped_steps_file(rank)).write_line(line)
        if rank == 0:
            print(f"step {step:>6}  no update: {reason}", flush=True)
        if self.in_a_row > self.max_in_a_row:
            first = step - self.in_a_row + 1
            if rank == 0:
                self._go_back(first, step)
            raise TrainingError(
                f"training: {self.in_a_row} steps in a row without an update, the last, {step}, for its {reason}; "
                f"{RunFolder(self.path).skipped_steps_file()} names them. Lower optim.lr, set trainer.max_grad_norm, "
                f"or leave the steps out: trainer.skip_steps=[[{first},{step}]]."
            )

    def _go_back(self, first: int, last: int) -> None:
        """Prepare the run, if it may, for being started again from before step `first`, and say so."""
        if self.rolled_back >= self.rollback:
            return
        if (made := go_back(self.path, first, last)) is None:
            print(f"rollback: there is no checkpoint from before step {first}", flush=True)
            return
        print(
            f"rollback {self.rolled_back + 1} of {self.rollback}: continues from step {made.to}, without the data of "
            f"steps {made.to + 1} to {made.last}",
            flush=True,
        )

    def export_state(self) -> dict[str, Any]:
        """The recent norms and the count of skipped steps, for a checkpoint."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `export_state` returned."""
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]
