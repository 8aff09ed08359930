"""Plans: which samples make up an optimizer step, and which rank computes them in which row.

A plan remembers nothing. The samples of step s follow from the seed and s, so a run resumes at any step in constant
time with any number of workers, and another world size with the same global batch sees the same global batches.

`SamplePlan` draws exactly G samples a step, one to a row or packed; `TokenPlan` fills steps of a token budget from
closed windows of the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.mixture import Address, Mixture
from vlm_train.data.pack import deal, fill_rows, share_rows
from vlm_train.errors import ConfigError
from vlm_train.randomness import derive_seed

Row = tuple[Address, ...]
"""The samples that share a row, in order."""

Micro = list[Row]
"""The rows of one forward pass of one rank."""

Group = Literal["modality", "length", "modality_length"]

RUNG = 64
"""Rows of like cost that are dealt to the ranks together: as many ranks wait for each other as little as they can."""


class Plan(Protocol):
    """What training asks of a plan."""

    world: int
    packing: Packing | None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank in one optimizer step: as many on every rank, empty ones included."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What is known of every sample, by index: tokens, views and cost `[N]`, and whether it has media."""

    tokens: NDArray[np.int32]
    views: NDArray[np.int32]
    costs: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows of several samples: at most `length` tokens and `views` views each. `sizes` are those of all samples."""

    sizes: Sizes
    length: int
    views: int | None = None


def check_batch(batch: int, world: int) -> None:
    """Raises `ConfigError` unless the ranks can share a batch of `batch` samples evenly."""
    if batch % world:
        raise ConfigError(
            f"batch.samples={batch} cannot be shared evenly by {world} ranks; allowed: multiples of {world}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplePlan:
    """Exactly `batch` samples an optimizer step, as papers count.

    Attributes:
        mixture: the order of samples.
        batch: samples per optimizer step, over all ranks.
        total: samples of the whole run; the last step may be short.
        world: ranks.
        micro: rows per rank and forward pass.
        packing: several samples share a row; None: one sample a row.
        media: whether each sample has media `[N]`; needed to group by modality.
        lengths: tokens of each sample `[N]`; needed to group by length.
        group: modality (every step is all with or all without media, as far as they go round: LLaVA's
            `group_by_modality_length`) | length (rows of like length in a micro-batch) | modality_length | None.
        window: samples among which steps are grouped by modality.
    """

    mixture: Mixture
    batch: int
    total: int
    world: int = 1
    micro: int = 1
    packing: Packing | None = None
    media: NDArray[np.bool_] | None = None
    lengths: NDArray[np.int32] | None = None
    group: Group | None = None
    window: int = 8192

    def __post_init__(self) -> None:
        check_batch(self.batch, self.world)
        if self.group is not None and self.group not in get_args(Group):
            raise ConfigError(f"data.group: {self.group!r}; allowed: null, {', '.join(get_args(Group))}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.total / self.batch)

    @property
    def micro_count(self) -> int:
        """Micro-batches of unpacked rows per optimizer step and rank (gradient accumulation)."""
        return math.ceil(self.batch // self.world / self.micro)

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank. A step's samples are dealt round-robin, so a short last step is as even as it
        can be."""
        addresses = self.samples(step)
        if self.packing is not None:
            return self._packed(addresses, self.packing, rank)
        if self.group in ("length", "modality_length"):
            assert self.lengths is not None
            lengths = self.lengths
            addresses = sorted(addresses, key=lambda address: -int(lengths[address.index]))
        rows: list[Row] = [(address,) for address in addresses[rank :: self.world]]
        return [rows[m * self.micro : (m + 1) * self.micro] for m in range(self.micro_count)]

    def samples(self, step: int) -> list[Address]:
        """All samples of one optimizer step."""
        if self.group in ("modality", "modality_length"):
            per_window = max(1, self.window // self.batch)
            window, place = divmod(step, per_window)
            return _by_modality(self, window, per_window)[place]
        first = step * self.batch
        return [self.mixture.draw(position) for position in range(first, min(first + self.batch, self.total))]

    def _packed(self, addresses: Sequence[Address], packing: Packing, rank: int) -> list[Micro]:
        index = [address.index for address in addresses]
        tokens, costs, views = (
            x[index].tolist() for x in (packing.sizes.tokens, packing.sizes.costs, packing.sizes.views)
        )
        at_once = self.world * self.micro
        rows = share_rows(tokens, costs, packing.length, multiple=at_once, views=views, max_views=packing.views)
        turns = deal([sum(costs[i] for i in row) for row in rows], self.world)
        return _micros([tuple(addresses[i] for i in rows[number]) for number in turns[:, rank]], self.micro)


@lru_cache(maxsize=4)
def _by_modality(plan: SamplePlan, window: int, steps: int) -> list[list[Address]]:
    """The steps of a window, each of one modality but for what is left over of both."""
    assert plan.media is not None
    first = window * steps * plan.batch
    drawn = [plan.mixture.draw(p) for p in range(first, min(first + steps * plan.batch, plan.total))]
    kinds = [[a for a in drawn if bool(plan.media[a.index]) is shown] for shown in (True, False)]
    whole = [len(kind) // plan.batch * plan.batch for kind in kinds]
    pure = [kind[c : c + plan.batch] for kind, end in zip(kinds, whole) for c in range(0, end, plan.batch)]
    rest = [address for kind, end in zip(kinds, whole) for address in kind[end:]]
    order = np.random.default_rng(derive_seed(plan.mixture.seed, "modality", window)).permutation(len(pure))
    return [*(pure[i] for i in order), *(rest[c : c + plan.batch] for c in range(0, len(rest), plan.batch))]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPlan:
    """Packed rows up to a token budget per optimizer step.

    Every closed window of the order is packed by itself; its rows are sorted by cost and dealt to steps in rungs of
    like cost, in random order. The steps of a window hold equally many rows, at most `tokens / packing.length`.

    Attributes:
        tokens: budget of an optimizer step, over all ranks.
        total: samples of the whole run; None: without end.
        most: steps of the whole run at most; None: until the samples end.
        window: samples packed together; more where a step is large.
    """

    mixture: Mixture
    packing: Packing
    tokens: int
    total: int | None = None
    most: int | None = None
    world: int = 1
    micro: int = 1
    window: int = 8192
    _known: dict[int, int] = field(default_factory=lambda: {0: 0}, repr=False)  # first step of a window -> window

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.packing.length, self.world, self.micro)
        if self.total is None and self.most is None:
            raise ConfigError("trainer.epochs and trainer.max_steps are both null: give one of them")

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.tokens // self.packing.length

    @property
    def samples_per_window(self) -> int:
        """Samples that are packed together: `window`, but enough for eight steps."""
        mean = max(float(self.packing.sizes.tokens.mean()), 1.0)
        return max(self.window, math.ceil(8 * self.tokens / mean))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run. Packs every window of it, unless `most` ends it earlier."""
        size, steps, window = self.samples_per_window, 0, 0
        while (self.total is None or window * size < self.total) and (self.most is None or steps < self.most):
            self._known[steps] = window
            steps, window = steps + len(_packed_window(self, window)), window + 1
        return min(steps, self.most or steps)

    def locate(self, step: int) -> tuple[int, int]:
        """The window of a step, and that window's first step."""
        first = max(known for known in self._known if known <= step)
        while step >= (end := first + len(_packed_window(self, self._known[first]))):
            self._known[end] = self._known[first] + 1
            first = end
        return self._known[first], first

    def remember(self, window: int, first: int) -> None:
        """Where `locate` once found a step, so that a resumed run need not pack what lies before it."""
        self._known[first] = window

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank."""
        window, first = self.locate(step)
        rows = _packed_window(self, window)[step - first]
        rows = [*rows, *[()] * (self.rows - len(rows))]
        costs = self.packing.sizes.costs
        turns = deal([sum(float(costs[address.index]) for address in row) for row in rows], self.world)
        return _micros([rows[number] for number in turns[:, rank]], self.micro)


def check_tokens(tokens: int, length: int, world: int, micro: int) -> None:
    """Raises `ConfigError` unless a budget of `tokens` is whole rows of `length` tokens that the ranks can share."""
    unit = length * world * micro
    if tokens % unit:
        raise ConfigError(
            f"batch.tokens={tokens} is not shared evenly by {world} ranks with batch.micro={micro} rows of "
            f"data.pack={length} tokens; allowed: multiples of {unit}"
        )


@lru_cache(maxsize=2)
def _packed_window(plan: TokenPlan, window: int) -> list[list[Row]]:
    """The steps of a window, as rows."""
    size, sizes = plan.samples_per_window, plan.packing.sizes
    stop = (window + 1) * size if plan.total is None else min((window + 1) * size, plan.total)
    drawn = [plan.mixture.draw(position) for position in range(window * size, stop)]
    index = [address.index for address in drawn]
    tokens, views = sizes.tokens[index].tolist(), sizes.views[index].tolist()
    packed = fill_rows(tokens, plan.packing.length, views=views, max_views=plan.packing.views)
    costs = sizes.costs[index]
    packed.sort(key=lambda row: -float(costs[row].sum()))
    steps = -(-len(packed) // plan.rows)
    rung = max(d for d in range(1, min(plan.rows, RUNG) + 1) if plan.rows % d == 0)
    count = steps * (plan.rows // rung)
    ends = np.linspace(0, len(packed), count + 1).round().astype(int)
    order = np.random.default_rng(derive_seed(plan.mixture.seed, "deal", window)).permutation(count)
    rungs = [packed[ends[i] : ends[i + 1]] for i in order]
    each = plan.rows // rung
    return [
        [tuple(drawn[i] for i in row) for rows in rungs[s * each : (s + 1) * each] for row in rows]
        for s in range(steps)
    ]


def _micros(rows: Sequence[Row], micro: int) -> list[Micro]:
    """A rank's rows as micro-batches; empty rows only hold a place."""
    return [[row for row in rows[first : first + micro] if row] for first in range(0, len(rows), micro)]
