"""What becomes of samples that cannot be used: each is recorded once, counted by kind, and too many stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from vlm_train.config.redact import without_credentials
from vlm_train.contracts.batch import Problem
from vlm_train.errors import TrainingError
from vlm_train.loggers.jsonl_writer import JsonlWriter
from vlm_train.runs.folder import RunFolder

MIN_DRAWN = 1000
"""Samples that a run draws before the share of bad ones among them is judged."""


class BadSamples:
    """Counts and budgets of a run. All ranks feed it the same sums, so all of them stop at the same step.

    Args:
        folder: the run's; bad samples go to `quarantine-<rank>.jsonl` in it.
        max_in_a_row: allowed bad samples in a row.
        max_share: allowed share of bad samples among all drawn ones, checked from `MIN_DRAWN` drawn samples on, and at
            the last step.
        strict: bear none.
    """

    def __init__(self, folder: Path, *, max_in_a_row: int, max_share: float, strict: bool) -> None:
        self.folder = folder
        self.max_in_a_row, self.max_share, self.strict = max_in_a_row, max_share, strict
        self.in_a_row = self.drawn = self.bad = 0  # over all ranks
        self.kinds: Counter[str] = Counter()  # of this rank
        self.last: Problem | None = None
        self._recorded: set[tuple[str, ...]] | None = None

    def count_problems(self, problems: Iterable[Problem]) -> None:
        """Count this rank's bad samples of an optimizer step."""
        for problem in problems:
            self.kinds[problem.kind] += 1
            self.last = problem

    def reason_to_stop(self, good: int, bad: int, *, last: bool = False) -> str | None:
        """Why the run must stop after an optimizer step of so many good and bad samples on all ranks, or None.

        The share is judged at the `last` step, however few samples were drawn until then: a run in which all are bad
        does not end well, nor does one of a small set that lost many.

        Which of a step's samples are good is not known here, so "in a row" is what they make at least.
        """
        self.drawn, self.bad = self.drawn + good + bad, self.bad + bad
        longest = self.in_a_row + bad if not good else -(-bad // (good + 1))
        self.in_a_row = 0 if good else longest
        if self.strict and bad:
            return "a bad sample, and trainer.strict=true"
        if longest > self.max_in_a_row:
            return f"{longest} bad samples in a row; trainer.max_bad_samples={self.max_in_a_row}"
        if last and self.bad == self.drawn:
            return f"none of the {self.drawn} drawn samples can be used"
        if (last or self.drawn >= MIN_DRAWN) and self.bad > self.max_share * self.drawn:
            share = f"{self.bad / self.drawn:.2%} of {self.drawn} drawn samples are bad"
            return f"{share}; trainer.max_bad_share={self.max_share}"
        return None

    def require_held_out(self, *, good: int, bad: int) -> None:
        """Raises TrainingError, on every rank, when the held-out samples of all ranks are not what they must be."""
        reason = f"{bad} bad samples, and trainer.strict=true" if self.strict else None
        if not good:
            reason = f"none of the {bad} held-out samples is usable"
        if bad and reason:
            raise TrainingError(f"data.val: {reason}; {RunFolder(self.folder).quarantine_file()} says why.")

    def summarize_kinds(self, kinds: Mapping[str, float]) -> str:
        """The bad samples by kind, for a message; `kinds` counts them on all ranks."""
        counts = ", ".join(f"{kind} {count:.0f}" for kind, count in sorted(kinds.items()))
        last = f" Last here: {self.last}" if self.last else ""
        return f"So far: {counts}. All of them: {RunFolder(self.folder).quarantine_file()}.{last}"

    def say_left_out(self, reason: str | None, kinds: Mapping[str, float], rank: int) -> None:
        """Raise TrainingError for a reason to stop, else print how many samples a run has left out at its end."""
        counts = self.summarize_kinds(kinds)
        if reason:
            raise TrainingError(f"data.train: {reason}. {counts}")
        if rank == 0:
            print(f"data.train: {self.bad} of {self.drawn} drawn samples left out. {counts}", flush=True)

    def record_problems(self, split: str, step: int, problems: Iterable[Problem], rank: int) -> None:
        """Write each bad sample once, also if the run was interrupted, and say the first one aloud."""
        path = RunFolder(self.folder).quarantine_file(rank)
        problems = [Problem(*without_credentials(astuple(problem))) for problem in problems]
        recorded = self._known_problems()
        new = [problem for problem in dict.fromkeys(problems) if _identify_problem(problem) not in recorded]
        if new and not recorded:
            print(f"{split}: left out: {new[0]} (all such samples: {path})", flush=True)
        recorded.update(map(_identify_problem, new))
        writer = JsonlWriter(path)
        for one in new:
            line = {"step": step, "split": split, "kind": one.kind, "shard": one.shard, "key": one.key}
            writer.write_line(line | {"problem": one.reason})

    def _known_problems(self) -> set[tuple[str, ...]]:
        if self._recorded is None:
            self._recorded = set()
            for path in self.folder.glob(RunFolder(self.folder).quarantine_file().name):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        held = json.loads(line)
                        problem = Problem(held["problem"], held["kind"], held["shard"], held["key"])
                    except (ValueError, KeyError, TypeError, RecursionError):  # half a line
                        continue
                    self._recorded.add(_identify_problem(problem))
        return self._recorded

    def export_state(self, kinds: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint keeps; `kinds` counts on all ranks."""
        return {"in_a_row": self.in_a_row, "drawn": self.drawn, "bad": self.bad, "kinds": dict(kinds)}

    def load_state(self, state: Mapping[str, Any], *, first_rank: bool) -> None:
        """Go on counting; the first rank takes the kinds of all."""
        self.in_a_row, self.drawn, self.bad = state["in_a_row"], state["drawn"], state["bad"]
        self.kinds = Counter(state["kinds"] if first_rank else {})


def _identify_problem(problem: Problem) -> tuple[str, ...]:
    return (problem.shard, problem.key) if problem.key else (problem.reason,)
