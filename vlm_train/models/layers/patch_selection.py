"""Which patches a Q-Former reads: a small head scores them, the best within a budget enter.

Legend: N views, P patches, K most patches kept, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError


class PatchSelection(nn.Module):
    """Scores every patch and keeps the best, in the order of the image.

    Kept patches enter as they are, so that a Q-Former that knows them all still fits, but backward sees each multiplied
    by its share of the kept patches' softmax, times K: a patch whose part in the result lowers the loss gains score,
    the others lose it and make room. (Patches that stay out get no gradient; the head is one for all.)

    Args:
        dim: D.
        budget: K: a whole number, or, below 1, a share of the patches, rounded up.
        mass: keep only the fewest of these whose softmax over all patches reaches that sum, so that K differs from
            view to view; null: always K.
        hidden: width of the head.
    """

    def __init__(self, *, dim: int, budget: float, mass: float | None = None, hidden: int = 256) -> None:
        super().__init__()
        if not (0 < budget < 1 or (budget >= 1 and budget == int(budget))):
            raise ConfigError(f"connector.budget: {budget}; allowed: a share below 1, or a whole number of patches")
        if mass is not None and not 0 < mass <= 1:
            raise ConfigError(f"connector.mass: {mass}; allowed: above 0, at most 1, or null")
        self.budget, self.mass = budget, mass
        self.score = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def count_selected(self, patches: int) -> int:
        """K for so many patches."""
        return min(patches, -int(-patches * self.budget // 1) if self.budget < 1 else int(self.budget))

    def forward(self, features: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ...]:
        """`[N, P, D]` -> `[N, K, D]`, and with `mass` or `seen` a mask `[N, 1, 1, K]`, True where a patch counts.

        `seen` `[N, P]` is False where a view has no patch; a share is then one of the patches that each view has.
        """
        scores = self.score(features).squeeze(-1).float()
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        best = scores.topk(self.count_selected(scores.shape[1]), dim=1)
        places, order = best.indices.sort(dim=1)
        counts = None if seen is None else self._within_budget(best.values, seen)
        values = best.values if counts is None else best.values.masked_fill(~counts, float("-inf"))
        share = values.gather(1, order).softmax(dim=1)
        number = share.shape[1] if counts is None else counts.sum(dim=1, keepdim=True)
        weight = 1 + (share - share.detach()) * number
        kept = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])) * weight[..., None].to(features)
        if self.mass is not None:
            reached = scores.softmax(dim=1).gather(1, best.indices)
            heavy = (reached.cumsum(dim=1) - reached) < self.mass  # the first one always
            counts = heavy if counts is None else heavy & counts
        return (kept,) if counts is None else (kept, counts.gather(1, order)[:, None, None])

    def _within_budget(self, best: Tensor, seen: Tensor) -> Tensor:
        """`[N, K]`, True for the first of the best patches, as many as the budget allows of the patches `[N, P]` that a
        view has."""
        patches = seen.sum(dim=1, keepdim=True)
        allowed = (patches * self.budget).ceil() if self.budget < 1 else patches
        return torch.arange(best.shape[1], device=best.device) < allowed
