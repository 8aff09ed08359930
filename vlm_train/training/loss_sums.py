"""Losses of one split as sums on their device, and the means that a log line gives of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_train.contracts.objective import Loss

PAIR = ("sum", "count")
"""What is kept of an objective and source."""

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
        self.sources: dict[str, Tensor] = {}  # <objective>/<source> -> [sum, count]

    def add_loss(self, name: str, loss: Loss) -> None:
        """Add a micro-batch's loss; its metrics are weighted by its count."""
        self.weights[name] = loss.weight
        entries = {f"{name}/sum": loss.sum, f"{name}/count": loss.count} | {
            f"{name}/{key}": value * loss.count for key, value in loss.metrics.items()
        }
        for key, value in entries.items():
            _add_value(self.totals, key, value)
        for source, pair in loss.sources.items():
            _add_value(self.sources, f"{name}/{source}", pair)

    def copy_sums(self) -> Sums:
        """The sums so far, whatever is added to these."""
        copied = Sums(self.weights)
        copied.totals, copied.sources = dict(self.totals), dict(self.sources)
        return copied

    def put_back_where(self, condition: Tensor, earlier: Sums) -> None:
        """Make these sums what they were `earlier` if `condition` holds, a bool `[]` on their device."""
        for held, before in ((self.totals, earlier.totals), (self.sources, earlier.sources)):
            for key, value in held.items():
                held[key] = torch.where(condition, before.get(key, torch.zeros_like(value)), value)

    def read_sums(self) -> dict[str, float]:
        """The sums of this rank, in one copy from the device."""
        values = torch.stack(list(self.totals.values())).tolist() if self.totals else []
        return dict(zip(self.totals, values, strict=True))

    def read_sources(self) -> dict[str, float]:
        """The sums and counts of every objective and source on this rank, in one copy."""
        pairs = torch.stack(list(self.sources.values())).tolist() if self.sources else []
        both = zip(self.sources, pairs, strict=True)
        return {f"{name}/{kind}": value for name, pair in both for kind, value in zip(PAIR, pair, strict=True)}

    def compute_means(self, over_ranks: OverRanks) -> dict[str, float]:
        """Means over ranks: `loss` in all, then every objective and metric. Empty if no rank has any."""
        by_name = over_ranks(self.read_sums())
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
        learned = any(by_name[name] for name in by_name if name.endswith("/count"))
        return {"loss": total} | row | self._by_source(over_ranks) if learned else {}

    def _by_source(self, over_ranks: OverRanks) -> dict[str, float]:
        """`loss/<source>`, the total over a source's own samples; nothing where all are of one source."""
        by_name = over_ranks(self.read_sources())
        row: dict[str, float] = {}
        for name in sorted(name for name in by_name if name.endswith("/sum")):
            objective, source = name.removesuffix("/sum").split("/", 1)
            mean = by_name[name] / max(by_name[f"{objective}/{source}/count"], 1e-8)
            row[f"loss/{source}"] = row.get(f"loss/{source}", 0.0) + self.weights.get(objective, 1.0) * mean
        return row if len(row) > 1 else {}


def _add_value(held: dict[str, Tensor], key: str, value: Tensor) -> None:
    value = value.detach().float()
    held[key] = value if key not in held else held[key].to(value.device) + value
