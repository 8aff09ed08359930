"""What is counted between two log lines, and the line it comes to.

Sums of tensors stay on their device until a line is due: nothing here makes a step wait for the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_train.data.batch import Window
from vlm_train.errors import TrainingError
from vlm_train.objectives.base import Loss

COUNTS = ("samples", "tokens", "places", "supervised", "skipped")
"""What is always counted; other names appear when they are first counted."""

OverRanks = Callable[[dict[str, float]], dict[str, float]]
"""Sums by name over all ranks. A collective: every rank makes the same calls."""


class Sums:
    """Losses of one split as sums, so that their means do not depend on how a step is cut.

    Args:
        weights: objective -> factor in the total, filled here. Kept by the owner: a rank without held-out samples knows
            them from training.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, loss: Loss) -> None:
        """Add a micro-batch's loss; its metrics are weighted by its count."""
        self.weights[name] = loss.weight
        entries = {f"{name}/sum": loss.sum, f"{name}/count": loss.count} | {
            f"{name}/{key}": value * loss.count for key, value in loss.metrics.items()
        }
        for key, value in entries.items():
            held = self.totals.get(key)
            value = value.detach().float()
            self.totals[key] = value if held is None else held.to(value.device) + value

    def read(self) -> dict[str, float]:
        """The sums of this rank, in one copy from the device."""
        values = torch.stack(list(self.totals.values())).tolist() if self.totals else []
        return dict(zip(self.totals, values, strict=True))

    def means(self, over_ranks: OverRanks) -> dict[str, float]:
        """Means over ranks: `loss` in all, then every objective and metric. Empty if no rank has any."""
        by_name = over_ranks(self.read())
        row: dict[str, float] = {}
        total = 0.0
        for name in sorted(by_name):
            objective, kind = name.rsplit("/", 1)
            if kind == "count":
                continue
            mean = by_name[name] / max(by_name[f"{objective}/count"], 1e-8)
            row[f"{objective}_loss" if kind == "sum" else f"{objective}_{kind}"] = mean
            if kind == "sum":
                total += self.weights.get(objective, 1.0) * mean
        losses = [key for key in row if key.endswith("_loss")]
        if len(losses) == 1:
            row.pop(losses[0])  # the only one is the loss
        return {"loss": total} | row if by_name else {}


class Meter:
    """Counts, sums and times of training since the last line, and the sums of a validation.

    Args:
        over_ranks: adds up over ranks.
        min_supervised: least share of the tokens that must be supervised; 0: any.
    """

    def __init__(self, over_ranks: OverRanks, *, min_supervised: float = 0.0) -> None:
        self.over_ranks, self.min_supervised = over_ranks, min_supervised
        self.weights: dict[str, float] = {}
        self.held_out = Sums(self.weights)
        self.since = time.perf_counter()
        self.paused = self.since
        self._reset()

    def _reset(self) -> None:
        self.train = Sums(self.weights)
        self.counts = dict.fromkeys(COUNTS, 0.0)
        self.drawn: dict[str, float] = {}  # source -> samples

    def count(self, name: str, number: float = 1.0) -> None:
        """Add to what is counted under `name` on this rank."""
        self.counts[name] = self.counts.get(name, 0.0) + number

    def open(self, window: Window) -> None:
        """Count what an optimizer step holds on this rank, and what was left out of it."""
        self.before = dict(self.train.totals)
        for source, number in window.sums.get("samples", {}).items():
            self.drawn[source] = self.drawn.get(source, 0.0) + number
        for name in ("samples", "tokens", "places", "supervised"):
            self.count(name, getattr(window, name))
        for problem in window.problems:
            self.count("skipped")
            self.count(f"skipped/{problem.kind}")

    def leave_out(self) -> None:
        """Forget the losses of the last step, which made no update."""
        self.train.totals = self.before
        self.count("skipped_steps")

    def line(self) -> dict[str, float]:
        """Means, rates and shares since the last line, on every rank. Starts the next one.

        Raises:
            TrainingError: too few of the tokens are supervised.
        """
        row = self.train.means(self.over_ranks)
        counts, drawn = self.over_ranks(self.counts), self.over_ranks(self.drawn)
        row |= self._rates(counts)
        row |= {name: number for name, number in sorted(counts.items()) if name.startswith("skipped")}
        if len(drawn) > 1:
            row |= {f"share/{name}": number / sum(drawn.values()) for name, number in sorted(drawn.items())}
        if counts["tokens"] and row["supervised_share"] < self.min_supervised:  # no tokens: all samples are left out
            raise TrainingError(
                f"data: only {row['supervised_share']:.2%} of the last {counts['tokens']:.0f} tokens are supervised, "
                f"less than trainer.min_supervised_ratio={self.min_supervised:.2%}. Look at what is learned with "
                "mode=show."
            )
        self._reset()
        return row

    def _rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return {
            "samples_per_second": counts["samples"] / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "supervised_share": counts["supervised"] / max(counts["tokens"], 1),
            "real_tokens_share": counts["tokens"] / max(counts["places"], 1),
        }

    def hold_out(self) -> None:
        """Start the sums of a validation."""
        self.held_out = Sums(self.weights)

    def pause(self) -> None:
        """Stop the clock of the training speed."""
        self.paused = time.perf_counter()

    def go_on(self) -> None:
        """Start it again."""
        self.since += time.perf_counter() - self.paused

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums of all ranks since the last line. A collective."""
        return {
            "totals": self.over_ranks(self.train.read()),
            "counts": self.over_ranks(self.counts),
            "drawn": self.over_ranks(self.drawn),
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with `state()`: for one rank, which takes the sums of all."""
        self.train.totals = {name: torch.tensor(value, device=device) for name, value in state["totals"].items()}
        self.counts, self.drawn = dict(state["counts"]), dict(state["drawn"])
