"""Mixing: which sample stands at a position of the endless training order.

The order is cut into blocks. A block draws a fixed quota from every source, the sources in random order; each source
goes through its own samples in passes of its own, each sample exactly once a pass, in another random order every time.
So the sample at any position follows from the seed and the position alone, in constant time.

Without weights a block is one pass over everything, and the quota of a source is all of its samples: one plain epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.order.permutation import Permutation
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed

Rule = Literal["concat", "weights", "sqrt", "temperature"]
Shuffle = Literal["full", "computed", "shards", "none"]

STORED_SAMPLES = 2**20
"""Samples up to which `data.shuffle=full` is a stored order (`full`); beyond them it is computed."""


@dataclass(frozen=True, slots=True, order=True)
class SampleRef:
    """One drawn sample: its index among all samples, and the pass over its source that draws it (both seed its
    augmentation)."""

    index: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """How one source takes part.

    Attributes:
        size: its samples.
        repeat: passes over it in one pass of the mixture (`concat`), or a factor on its size (`sqrt`, `temperature`).
        weight: its relative share (`weights`).
        share: its fixed share of all draws, whatever the rule gives the others (a tenth of text-only dialogue).
        shards: first sample of every shard, for `shuffle: shards`.
    """

    size: int
    repeat: float = 1.0
    weight: float | None = None
    share: float | None = None
    shards: tuple[int, ...] = (0,)

    @property
    def draws(self) -> int:
        """Its samples in one pass of the mixture."""
        return max(1, round(self.size * self.repeat))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The endless order over several sources.

    Args:
        sources: their samples are numbered through, in this order.
        rule: concat (everything once a pass) | weights | sqrt (of the size: InstructBLIP) | temperature
            (size ** (1 / temperature)).
        shuffle: full (a pass in any order; 8 bytes of memory a sample in every loader process, 20 with several sources,
            and twice that from the second pass on, as two passes may share a step) | computed (a pass in any order, in
            constant memory) | shards (`pool` shards at a time, for sets too large or too far away for random reads; 8
            bytes a sample of the pool of each source) | none.
        block: draws after which the quotas are exact; `concat`, exact after every pass, mixes so many at a time where
            the order is computed or by shards.
        pool: shards whose samples are mixed with each other. A sample's neighbours in its shard end up anywhere among
            the samples of `pool` shards drawn at random; with one shard in the pool they stay within its length.
    """

    sources: tuple[Share, ...]
    seed: int
    rule: Rule = "concat"
    temperature: float = 1.0
    shuffle: Shuffle = "full"
    block: int = 8192
    pool: int = 16

    def __post_init__(self) -> None:
        _check_mixture(self)

    @property
    def samples(self) -> int:
        """Draws in one pass of the mixture."""
        return sum(source.draws for source in self.sources)

    @cached_property
    def quotas(self) -> NDArray[np.int64]:
        """Draws from every source in a block `[S]`; not for `concat` without fixed shares, whose blocks cut a pass."""
        return apportion_shares(self.shares, max(self.block, len(self.sources)))

    @cached_property
    def shares(self) -> list[float]:
        """The share of every source in all draws."""
        fixed = sum(source.share or 0.0 for source in self.sources)
        raw = [0.0 if source.share is not None else self._weight_of(source) for source in self.sources]
        free = (1.0 - fixed) / sum(raw) if any(raw) else 0.0
        return [w * free if s.share is None else s.share for s, w in zip(self.sources, raw, strict=True)]

    def draw_sample(self, position: int) -> SampleRef:
        """The sample at a position."""
        which, nth = self._locate_source(position) if len(self.sources) > 1 else (0, position)
        epoch, place = divmod(nth, self.sources[which].size)
        return SampleRef(self._starts[which] + self._order_pass(which, epoch)(place), epoch)

    def _weight_of(self, source: Share) -> float:
        match self.rule:
            case "concat":
                return float(source.draws)
            case "weights":
                return source.weight if source.weight is not None else 1.0
            case "sqrt":
                return math.sqrt(source.draws)
            case "temperature":
                return source.draws ** (1.0 / self.temperature)

    @cached_property
    def _starts(self) -> list[int]:
        """First sample of every source."""
        return [0, *accumulate(source.size for source in self.sources)]

    @cached_property
    def _period(self) -> tuple[NDArray[np.int64], int]:
        """The draws from every source in a period `[S]`, after which each has been drawn from exactly as often as it
        should, and the blocks in which a period is mixed.

        A period is a block of fixed quotas, or (`concat`) a pass over everything, in one block where it is stored.
        """
        if self.rule != "concat" or any(source.share for source in self.sources):
            return self.quotas, 1
        draws = np.array([source.draws for source in self.sources])
        return draws, -(-int(draws.sum()) // self.block) if self.shuffle in ("shards", "computed") else 1

    def _draws_before(self, block: int) -> NDArray[np.int64]:
        """The draws from every source in the blocks of a period before this one `[S]`."""
        draws, blocks = self._period
        return block * draws // blocks

    def _locate_source(self, position: int) -> tuple[int, int]:
        """The source that a position draws from, and how many draws from that source come before it."""
        draws, blocks = self._period
        total = self._period_draws
        period, place = divmod(position, total)
        block = place * blocks // total  # or one of the next, as the cuts are rounded down
        while block + 1 < blocks and int(self._draws_before(block + 1).sum()) <= place:
            block += 1
        before = self._draws_before(block)
        slot = place - int(before.sum())
        if self.shuffle == "none":
            which = int(np.searchsorted(np.cumsum(draws), slot, side="right"))
            return which, period * int(draws[which]) + slot - int(draws[:which].sum())
        sources, nths = self._cached_value(("block", period * blocks + block), self._mix_block)
        which = int(sources[slot])
        return which, period * int(draws[which]) + int(before[which]) + int(nths[slot])

    @cached_property
    def _period_draws(self) -> int:
        return int(self._period[0].sum())

    def _mix_block(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """For every slot of a block: its source, and how many slots of that source come before it in the block."""
        block = number % self._period[1]
        quotas = self._draws_before(block + 1) - self._draws_before(block)
        sources = np.repeat(np.arange(len(self.sources), dtype=np.int32), quotas)
        sources = np.random.default_rng(derive_seed(self.seed, "mix", number)).permutation(sources)
        nths = np.empty(len(sources), np.int64)
        nths[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(quota) for quota in quotas])
        return sources, nths

    def _order_pass(self, which: int, epoch: int) -> Callable[[int], int]:
        """The order of one pass over a source."""
        if self.shuffle == "none":
            return int
        return self._cached_value(("order", which, epoch), self._shuffle_pass)

    def _shuffle_pass(self, which: int, epoch: int) -> Callable[[int], int]:
        source, seed = self.sources[which], derive_seed(self.seed, "order", *([which] if which else []), epoch)
        if self.shuffle == "shards":
            return _Pools(seed, source.shards, source.size, self.pool)
        if self.shuffle == "computed":
            return Permutation(seed, source.size)
        order = np.random.default_rng(seed).permutation(source.size)
        return lambda place: int(order[place])

    def _cached_value(self, key: tuple[Any, ...], make: Callable[..., Any]) -> Any:
        """What `make(*key[1:])` made before; of every kind, the two of the highest number are kept."""
        cache = self._cache
        if key not in cache:
            for old in [old for old in cache if old[:-1] == key[:-1] and old[-1] < key[-1] - 1]:
                del cache[old]
            cache[key] = make(*key[1:])
        return cache[key]

    @cached_property
    def _cache(self) -> dict[tuple[Any, ...], Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Pools:
    """One pass over a source, `pool` shards at a time: the shards in random order, and their samples mixed."""

    def __init__(self, seed: int, starts: tuple[int, ...], size: int, pool: int) -> None:
        self.seed, self.pool = seed, pool
        self.starts = np.asarray(starts)
        self.lengths = np.diff([*starts, size])
        self.order = np.random.default_rng(derive_seed(seed, "shards")).permutation(len(starts))
        self.ends = np.cumsum([self.lengths[shards].sum() for shards in self._make_groups()])
        self.kept: dict[int, NDArray[np.int64]] = {}  # of the group that was asked for last

    def _make_groups(self) -> list[NDArray[np.int64]]:
        return [self.order[first : first + self.pool] for first in range(0, len(self.order), self.pool)]

    def __call__(self, place: int) -> int:
        group = int(np.searchsorted(self.ends, place, side="right"))
        start = int(self.ends[group - 1]) if group else 0
        return int(self._samples_of(group)[place - start])

    def _samples_of(self, group: int) -> NDArray[np.int64]:
        if group not in self.kept:  # each source keeps its own: draws alternate between sources
            self.kept = {group: self._mix_group(group)}
        return self.kept[group]

    def _mix_group(self, group: int) -> NDArray[np.int64]:
        shards = self.order[group * self.pool : (group + 1) * self.pool]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.lengths[s]) for s in shards])
        return np.random.default_rng(derive_seed(self.seed, "pool", group)).permutation(samples)


def apportion_shares(shares: Sequence[float], total: int) -> NDArray[np.int64]:
    """Whole numbers that add up to `total`, as near to `shares` as they get (largest remainder), each at least 1."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = total - int(quotas.sum())
    if missing >= 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:  # tiny shares were rounded up to 1: the largest pay
        for _ in range(-missing):
            quotas[int(np.argmax(quotas))] -= 1
    return quotas


def _check_mixture(mixture: Mixture) -> None:
    problems = []
    for name, allowed in (("rule", Rule), ("shuffle", Shuffle)):
        if getattr(mixture, name) not in get_args(allowed):
            shown = "mixture" if name == "rule" else name
            choices = ", ".join(one for one in get_args(allowed) if one != "computed")  # what large sets make of full
            problems.append(f"data.{shown}: {getattr(mixture, name)!r}; allowed: {choices}")
    if not mixture.sources or not all(source.size > 0 for source in mixture.sources):
        problems.append("data.train: no samples")
    fixed = sum(source.share or 0.0 for source in mixture.sources)
    if fixed > 1.0 + 1e-9 or (fixed > 1.0 - 1e-9 and any(source.share is None for source in mixture.sources)):
        problems.append(f"data.train: the fixed shares add up to {fixed:g}, which leaves nothing to the other sources")
    if mixture.sources and all(s.share is not None for s in mixture.sources) and abs(fixed - 1.0) > 1e-6:
        problems.append(f"data.train: every source has a fixed share, but they add up to {fixed:g}, not 1")
    if mixture.rule != "weights" and any(source.weight is not None for source in mixture.sources):
        problems.append(f"data.train: a weight counts only with data.mixture=weights, got {mixture.rule!r}")
    if mixture.rule != "temperature" and mixture.temperature != 1.0:
        problems.append(f"data.temperature: counts only with data.mixture=temperature, got {mixture.rule!r}")
    for source in mixture.sources:
        if source.share is not None and source.share * mixture.block < 1:
            problems.append(
                f"data.train: a share of {source.share:g} of data.block_samples={mixture.block} is less than a sample"
            )
    if problems:
        raise ConfigError(problems)
