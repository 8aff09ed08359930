"""A plan by tokens: steps of packed rows within a token budget."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from vlm_train.data.order.lengths import hash_content
from vlm_train.data.order.mixture import Mixture
from vlm_train.data.order.packing import BUFFER, assign_rows_to_ranks, fill_rows
from vlm_train.data.order.sample_plan import Micro, Packing, Row, check_tokens, micro_batches
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed

COST_BUCKET = 64
"""Rows of like cost that the ranks get together: as many ranks wait for each other as little as they can."""


STEPS = 64
"""Steps whose rows are packed and assigned together, at most."""


@dataclass(frozen=True)
class PackingCursor:
    """Where a window of packed rows starts in the order: the next position, and the earlier ones that still wait."""

    next: int
    waiting: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPlan:
    """Packed rows up to a token budget per optimizer step.

    The order is packed in windows of `STEPS` steps, or of a pass where that is less; the samples that still wait for a
    row at a window's end open the next one. The rows of a window are sorted by cost and assigned to its steps in
    buckets of like cost, in random order.

    Attributes:
        tokens: budget of an optimizer step, over all ranks.
        total: samples of the whole run; None: without end. The last step may be short. Its steps are counted by packing
            all of it: `end_by_estimate` does without.
        most: steps of the whole run at most; None: until the samples end.
    """

    mixture: Mixture
    packing: Packing
    tokens: int
    total: int | None = None
    most: int | None = None
    world: int = 1
    micro: int = 1
    _cursors: dict[int, PackingCursor] = field(
        default_factory=lambda: {0: PackingCursor(0, ())}, repr=False
    )  # where windows start

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.packing.length, self.world, self.micro)
        if self.total is None and self.most is None:
            raise ConfigError("trainer.epochs and trainer.max_steps are both null: give one of them")

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.tokens // self.packing.length

    @cached_property
    def steps_per_window(self) -> int:
        """Steps that are packed and assigned together: passes over the samples should not mix."""
        sizes, total = self.packing.sizes, self.mixture.samples
        one_pass = total * sizes.mean_tokens / (self.rows * self.packing.length)
        return min(STEPS, max(1, int(one_pass)))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run. Packs all of it, unless `most` ends it earlier."""
        window, steps = 0, 0
        while (self.most is None or steps < self.most) and not self._is_past_end(window):
            steps += self.steps_per_window if self.total is None else len(_packed_window(self, window))
            window += 1
        return min(steps, self.most or steps)

    def end_by_estimate(self, total: int) -> TokenPlan:
        """This plan without an exact end: it packs no more than its first window, and ends after as many steps as
        `total` samples of the mixture take, if all windows are as full as the first. Its last step is a whole one."""
        endless = replace(self, total=None, most=1)
        rows = [row for step in _packed_window(endless, 0) for row in step]
        placed = sum(int(self.packing.sizes.tokens[ref.index]) for row in rows for ref in row)
        steps = max(1, math.ceil(total * self._mean_drawn / placed * len(rows) / self.rows))
        object.__setattr__(endless, "most", min(steps, self.most or steps))  # a copy would pack the window again
        return endless

    @property
    def _mean_drawn(self) -> float:
        """Tokens of a draw: the mean of each source, by its share."""
        tokens, first, mean = self.packing.sizes.tokens, 0, 0.0
        for source, share in zip(self.mixture.sources, self.mixture.shares, strict=True):
            mean += share * float(tokens[first : first + source.size].mean())
            first += source.size
        return mean

    def _is_past_end(self, window: int) -> bool:
        if self.total is None:
            return False
        cursor = self.find_cursor(window)
        return cursor.next >= self.total and not cursor.waiting

    def find_cursor(self, window: int) -> PackingCursor:
        """Where a window starts: packs the ones before it, unless it was reached or remembered."""
        last = max(known for known in self._cursors if known <= window)
        for before in range(last, window):
            _packed_window(self, before)
        return self._cursors[window]

    @cached_property
    def identity(self) -> str:
        """Hash of what the cursors of an endless plan follow from."""
        packing, sizes = self.packing, self.packing.sizes
        arrays = (hashlib.sha256(np.ascontiguousarray(x).data).hexdigest() for x in (sizes.tokens, sizes.patches))
        return hash_content(self.mixture, self.tokens, self.total, packing.length, packing.patches, *arrays)

    def remember_cursor(self, window: int, cursor: PackingCursor) -> None:
        """What `find_cursor` once found, so that a resumed run need not pack what lies before it."""
        self._cursors[window] = cursor

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank."""
        window, place = divmod(step, self.steps_per_window)
        rows = _packed_window(self, window)[place]
        rows = [*rows, *[()] * (self.rows - len(rows))]
        costs = self.packing.sizes.costs
        turns = assign_rows_to_ranks([sum(float(costs[ref.index]) for ref in row) for row in rows], self.world)
        return micro_batches([rows[number] for number in turns[:, rank]], self.micro)


@lru_cache(maxsize=2)
def _packed_window(plan: TokenPlan, window: int) -> list[list[Row]]:
    """The steps of a window, as rows. Notes where the next window starts."""
    cursor, sizes, most = plan.find_cursor(window), plan.packing.sizes, plan.steps_per_window * plan.rows
    enough = 1.05 * most * plan.packing.length / sizes.mean_tokens
    while True:
        stop = cursor.next + math.ceil(enough)
        positions = [*cursor.waiting, *range(cursor.next, stop if plan.total is None else min(stop, plan.total))]
        drawn = [plan.mixture.draw_sample(position) for position in positions]
        index = [ref.index for ref in drawn]
        tokens, patches = sizes.tokens[index].tolist(), sizes.patches[index].tolist()
        rows = fill_rows(tokens, plan.packing.length, patches=patches, max_patches=plan.packing.patches, most=most)
        taken = {i for row in rows for i in row}
        seen = len(taken) + BUFFER  # by the packer, which holds the others ready
        if seen <= len(positions) or stop >= (plan.total or math.inf):
            break
        enough *= 2  # these samples are shorter than the others
    waiting = tuple(position for i, position in enumerate(positions[:seen]) if i not in taken)
    plan.remember_cursor(window + 1, PackingCursor(cursor.next + len(positions[:seen]) - len(cursor.waiting), waiting))
    return _assign_rows_to_steps(plan, window, [tuple(drawn[i] for i in row) for row in rows])


def _assign_rows_to_steps(plan: TokenPlan, window: int, rows: list[Row]) -> list[list[Row]]:
    """Rows as steps: buckets of like cost in random order. What is no whole bucket, at the end of a run, comes last."""
    costs = plan.packing.sizes.costs
    rows = sorted(rows, key=lambda row: -sum(float(costs[ref.index]) for ref in row))
    bucket = max(size for size in range(1, min(plan.rows, COST_BUCKET) + 1) if plan.rows % size == 0)
    buckets = [rows[first : first + bucket] for first in range(0, len(rows), bucket)]
    whole = len(rows) // bucket
    order = np.random.default_rng(derive_seed(plan.mixture.seed, "deal", window)).permutation(whole)
    ordered = [row for number in [*order, *range(whole, len(buckets))] for row in buckets[number]]
    return [ordered[first : first + plan.rows] for first in range(0, len(ordered), plan.rows)]
