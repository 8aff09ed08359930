"""Plans: which samples make up an optimizer step, and which rank computes them in which row.

A plan remembers nothing. The samples of step s follow from the seed and s, so a run resumes at any step in constant
time with any number of workers, and another world size with the same global batch sees the same global batches.

`SamplePlan` draws exactly G samples a step, one to a row or packed; `vlm_train.data.order.token_plan.TokenPlan` fills
steps of a token budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.order.mixture import Mixture, SampleRef
from vlm_train.data.order.packing import assign_rows_to_ranks, share_rows
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed

Row = tuple[SampleRef, ...]
"""The samples that share a row, in order."""

Micro = list[Row]
"""The rows of one forward pass of one rank."""

Group = Literal["modality", "length", "modality_length"]


class Plan(Protocol):
    """What training asks of a plan."""

    @property
    def world(self) -> int:
        """Ranks."""
        ...

    @property
    def packing(self) -> Packing | None:
        """How rows are packed; None: one sample a row."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank in one optimizer step: as many on every rank, empty ones included."""
        ...


class MediaFlags(Protocol):
    """Whether a sample has media, by index: an array `[N]`, or what looks it up."""

    def __getitem__(self, index: int, /) -> Any:
        """Whether sample `index` has media."""
        ...


class Costs(Protocol):
    """The cost of samples by index: an array `[N]`, or what computes its entries when they are asked for."""

    def __getitem__(self, index: Any, /) -> Any:
        """The cost of a sample, or `[K]` of a list of them."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What is known of every sample, by index: tokens, patches and cost `[N]`."""

    tokens: NDArray[np.int32]
    patches: NDArray[np.int32]
    costs: Costs

    @cached_property
    def mean_tokens(self) -> float:
        """Tokens of a sample, at least 1."""
        return max(float(self.tokens.mean()), 1.0)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows of several samples: at most `length` tokens and `patches` patches each. `sizes` are those of all samples."""

    sizes: Sizes
    length: int
    patches: int | None = None


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
        media: whether a sample has media, by index; needed to group by modality.
        lengths: tokens of each sample `[N]`; needed to group unpacked rows by length.
        group_by: modality (every step is all with or all without media, as far as they go round: LLaVA's
            `group_by_modality_length`) | length (rows of like length in a micro-batch) | modality_length | None.
        block_samples: samples among which steps are grouped by modality.
    """

    mixture: Mixture
    batch: int
    total: int
    world: int = 1
    micro: int = 1
    packing: Packing | None = None
    media: MediaFlags | None = None
    lengths: NDArray[np.int32] | None = None
    group_by: Group | None = None
    block_samples: int = 8192

    def __post_init__(self) -> None:
        check_batch(self.batch, self.world)
        if self.group_by is not None and self.group_by not in get_args(Group):
            raise ConfigError(f"data.group_by: {self.group_by!r}; allowed: null, {', '.join(get_args(Group))}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.total / self.batch)

    @property
    def micro_count(self) -> int:
        """Micro-batches of unpacked rows per optimizer step and rank (gradient accumulation)."""
        return math.ceil(self.batch // self.world / self.micro)

    def step(self, step: int, rank: int = 0) -> list[Micro]:
        """The micro-batches of one rank. Ranks take a step's samples in turn, so a short last step is as even as it can
        be."""
        refs = self.samples_of_step(step)
        if self.packing is not None:
            return self._pack_step(refs, self.packing, rank)
        if self.group_by in ("length", "modality_length"):
            assert self.lengths is not None
            lengths = self.lengths
            refs = sorted(refs, key=lambda ref: -int(lengths[ref.index]))
        rows: list[Row] = [(ref,) for ref in refs[rank :: self.world]]
        return [rows[m * self.micro : (m + 1) * self.micro] for m in range(self.micro_count)]

    def samples_of_step(self, step: int) -> list[SampleRef]:
        """All samples of one optimizer step."""
        if self.group_by in ("modality", "modality_length"):
            per_block = max(1, self.block_samples // self.batch)
            block, place = divmod(step, per_block)
            return _by_modality(self, block, per_block)[place]
        first = step * self.batch
        return [self.mixture.draw_sample(position) for position in range(first, min(first + self.batch, self.total))]

    def _pack_step(self, refs: Sequence[SampleRef], packing: Packing, rank: int) -> list[Micro]:
        index = [ref.index for ref in refs]
        tokens, costs, patches = (
            x[index].tolist() for x in (packing.sizes.tokens, packing.sizes.costs, packing.sizes.patches)
        )
        at_once = self.world * self.micro
        rows = share_rows(tokens, costs, packing.length, multiple=at_once, patches=patches, max_patches=packing.patches)
        turns = assign_rows_to_ranks([sum(costs[i] for i in row) for row in rows], self.world)
        return micro_batches([tuple(refs[i] for i in rows[number]) for number in turns[:, rank]], self.micro)


@lru_cache(maxsize=4)
def _by_modality(plan: SamplePlan, block: int, steps: int) -> list[list[SampleRef]]:
    """The steps of a block, each of one modality but for what is left over of both."""
    assert plan.media is not None
    first = block * steps * plan.batch
    drawn = [plan.mixture.draw_sample(p) for p in range(first, min(first + steps * plan.batch, plan.total))]
    kinds = [[a for a in drawn if bool(plan.media[a.index]) is shown] for shown in (True, False)]
    whole = [len(kind) // plan.batch * plan.batch for kind in kinds]
    pure = [kind[c : c + plan.batch] for kind, end in zip(kinds, whole) for c in range(0, end, plan.batch)]
    rest = [ref for kind, end in zip(kinds, whole) for ref in kind[end:]]
    order = np.random.default_rng(derive_seed(plan.mixture.seed, "modality", block)).permutation(len(pure))
    return [*(pure[i] for i in order), *(rest[c : c + plan.batch] for c in range(0, len(rest), plan.batch))]


def check_tokens(tokens: int, length: int, world: int, micro: int) -> None:
    """Raises `ConfigError` unless a budget of `tokens` is whole rows of `length` tokens that the ranks can share."""
    unit = length * world * micro
    if tokens % unit:
        raise ConfigError(
            f"batch.tokens={tokens} is not shared evenly by {world} ranks with batch.micro={micro} rows of "
            f"data.pack={length} tokens; allowed: multiples of {unit}"
        )


def micro_batches(rows: Sequence[Row], micro: int) -> list[Micro]:
    """A rank's rows as micro-batches; empty rows only hold a place."""
    return [[row for row in rows[first : first + micro] if row] for first in range(0, len(rows), micro)]
