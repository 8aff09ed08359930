"""Which patches a Q-Former reads: a small head scores them, the best within a budget enter.

Legend: N views, P patches, K most patches kept, D width.
"""

from __future__ import annotations

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

    def count(self, patches: int) -> int:
        """K for so many patches."""
        return min(patches, -int(-patches * self.budget // 1) if self.budget < 1 else int(self.budget))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """`[N, P, D]` -> `[N, K, D]`, and with `mass` a mask `[N, 1, 1, K]`, True where a patch counts."""
        scores = self.score(features).squeeze(-1).float()
        best = scores.topk(self.count(scores.shape[1]), dim=1)
        places, order = best.indices.sort(dim=1)
        share = best.values.gather(1, order).softmax(dim=1)
        weight = 1 + (share - share.detach()) * share.shape[1]
        kept = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])) * weight[..., None].to(features)
        if self.mass is None:
            return (kept,)
        reached = scores.softmax(dim=1).gather(1, best.indices)
        counts = (reached.cumsum(dim=1) - reached) < self.mass  # the first one always
        return kept, counts.gather(1, order)[:, None, None]
