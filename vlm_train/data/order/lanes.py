"""Lanes of a stream: which of them gives a place of a step, whatever the number of ranks and loader processes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LaneDeal:
    """How the places of a step of `batch` samples are dealt to lanes: `steps` steps in turn, `rows` lanes a step.

    Rank r of W takes the places r, r + W, ..., and loader process w of K the steps w, w + K, ...: where W divides
    `rows` and K divides `steps`, one process reads a lane.
    """

    batch: int
    rows: int
    steps: int

    @classmethod
    def deal_lanes(cls, batch: int, lanes: int) -> LaneDeal:
        """`lanes`, a power of two, nearly as many a step as steps."""
        rows = math.gcd(batch, 1 << (lanes.bit_length() // 2))
        return cls(batch, rows, lanes // rows)

    def locate_place(self, position: int) -> tuple[int, int]:
        """The lane that gives a position of the order, and how many samples it has given before."""
        step, place = divmod(position, self.batch)
        lane = step % self.steps * self.rows + place % self.rows
        return lane, step // self.steps * (self.batch // self.rows) + place // self.rows
