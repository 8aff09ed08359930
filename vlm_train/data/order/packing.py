"""Packing: which samples share a row. Pure functions over lengths; nothing here knows what a sample is.

`fill_rows` closes full rows of a fixed length (token budgets), `share_rows` spreads a given set of samples over as
few and as even rows as a step needs (exact sample counts). Both are bounded by tokens and, optionally, by patches of
images, and give the same rows for the same input everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from vlm_train.errors import ConfigError

BUFFER = 64
"""Samples that compete for the places of a row. More hardly fill better (the sums of 64 lengths are dense enough)."""

Rows = list[list[int]]


def fill_rows(
    tokens: Sequence[int],
    budget: int,
    *,
    patches: Sequence[int] | None = None,
    max_patches: int | None = None,
    buffer: int = BUFFER,
    most: int | None = None,
) -> Rows:
    """Samples in rows of at most `budget` tokens and `max_patches` patches, as full as they get.

    Every row takes the oldest sample that is left, so none waits longer than its turn, and with it the subset of the
    next `buffer` samples whose lengths add up closest to the budget.

    Args:
        tokens: length of every sample; 0: a skipped sample, which takes no place.
        patches: patches of every sample; read with `max_patches` only.
        most: rows at most; the next `buffer` samples have then been seen. None: rows for all samples.

    Returns:
        Indices, ascending inside every row.

    Raises:
        ConfigError: a sample that fits no row.
    """
    _check_each(tokens, budget, patches, max_patches)
    counts = [0] * len(tokens) if patches is None or max_patches is None else patches
    waiting = iter(range(len(tokens)))
    pool = _take_samples(waiting, buffer)
    rows: Rows = []
    while pool and (most is None or len(rows) < most):
        oldest, rest = pool[0], pool[1:]
        room = None if max_patches is None else max_patches - counts[oldest]
        chosen = _best_subset([tokens[i] for i in rest], budget - tokens[oldest], [counts[i] for i in rest], room)
        holes = [i for i in rest if not tokens[i]]  # kept back, they would take the places of others in the buffer
        row = sorted([oldest, *(rest[k] for k in chosen), *holes])
        rows.append(row)
        taken = set(row)
        pool = [i for i in pool if i not in taken] + _take_samples(waiting, len(row))
    return rows


def share_rows(
    tokens: Sequence[int],
    costs: Sequence[float],
    budget: int,
    *,
    multiple: int = 1,
    patches: Sequence[int] | None = None,
    max_patches: int | None = None,
) -> Rows:
    """All samples in a multiple of `multiple` rows, as few as hold them, of about equal cost.

    Args:
        costs: what a sample costs to compute, in any unit.
        multiple: rows that are computed at the same time, on all ranks.

    Returns:
        Indices, ascending inside every row; rows may be empty where there are fewer samples than rows.

    Raises:
        ConfigError: a sample that fits no row.
    """
    _check_each(tokens, budget, patches, max_patches)
    counts = [0] * len(tokens) if patches is None or max_patches is None else patches
    least = -(-sum(tokens) // budget)
    if max_patches is not None:
        least = max(least, -(-sum(counts) // max_patches))
    number = max(1, -(-least // multiple)) * multiple
    while True:
        rows = _spread_samples(tokens, costs, counts, number, budget, max_patches)
        if rows is not None:
            return rows
        number += multiple


def assign_rows_to_ranks(costs: Sequence[float], ranks: int) -> NDArray[np.int64]:
    """`[len(costs) / ranks, ranks]`: which row every rank computes in which turn, rows of like cost at the same time.

    Turns alternate in direction, so that no rank is given the dearer row every time.
    """
    order = np.argsort(-np.asarray(costs), kind="stable").reshape(-1, ranks)
    order[1::2] = order[1::2, ::-1]
    return order


def _check_each(tokens: Sequence[int], budget: int, patches: Sequence[int] | None, max_patches: int | None) -> None:
    if len(tokens) and max(tokens) > budget:
        raise ConfigError(f"data.pack: a sample of {max(tokens)} tokens does not fit into rows of {budget}")
    if max_patches is not None and patches is not None and len(patches) and max(patches) > max_patches:
        raise ConfigError(
            f"data.pack_patches: a sample of {max(patches)} patches does not fit into rows of {max_patches}"
        )


def _take_samples(source: Iterator[int], count: int) -> list[int]:
    return list(islice(source, count))


def _best_subset(tokens: Sequence[int], budget: int, patches: Sequence[int], room: int | None) -> list[int]:
    """Indices of the subset with the largest sum of tokens within `budget`, with at most `room` patches.

    Subset sums as the bits of an integer: bit s of `sums[k]` says that some of the first k samples add up to s.
    """
    sums, limit = [1], (1 << (budget + 1)) - 1
    for length in tokens:
        sums.append((sums[-1] | sums[-1] << length) & limit)
        if sums[-1] >> budget:
            break  # an exact fit
    left = sums[-1].bit_length() - 1
    chosen = []
    for k in range(len(sums) - 2, -1, -1):
        if not sums[k] >> left & 1:
            chosen.append(k)
            left -= tokens[k]
    if room is not None and sum(patches[k] for k in chosen) > room:
        half = BUFFER // 2  # this takes much longer, and fewer lengths still fill well
        return _best_subset_of_few_patches(tokens[:half], budget, patches[:half], room)
    return chosen[::-1]


def _best_subset_of_few_patches(tokens: Sequence[int], budget: int, patches: Sequence[int], room: int) -> list[int]:
    """The same where patches are scarce: for every sum of tokens, the subset of the fewest patches that gives it."""
    fewest = np.full(budget + 1, room + 1, np.int32)
    fewest[0] = 0
    better: list[NDArray[np.bool_]] = []
    for length, count in zip(tokens, patches, strict=True):
        offered = np.full(budget + 1, room + 1, np.int32)
        if length <= budget:
            offered[length:] = fewest[: budget + 1 - length] + count
        better.append(offered < fewest)
        fewest = np.minimum(fewest, offered)
        if fewest[budget] <= room:
            break
    left = int(np.flatnonzero(fewest <= room)[-1])
    chosen = []
    for k in range(len(better) - 1, -1, -1):
        if better[k][left]:
            chosen.append(k)
            left -= tokens[k]
    return chosen[::-1]


def _spread_samples(
    tokens: Sequence[int],
    costs: Sequence[float],
    patches: Sequence[int],
    number: int,
    budget: int,
    max_patches: int | None,
) -> Rows | None:
    """The dearest sample first, each into the cheapest row with room for it; None if one finds no room."""
    rows: Rows = [[] for _ in range(number)]
    space, room = [budget] * number, [max_patches if max_patches is not None else sum(patches)] * number
    heap = [(0.0, row) for row in range(number)]
    for i in sorted(range(len(tokens)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and (tokens[i] > space[heap[0][1]] or patches[i] > room[heap[0][1]]):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row = heapq.heappop(heap)
        rows[row].append(i)
        space[row], room[row] = space[row] - tokens[i], room[row] - patches[i]
        for entry in (*full, (cost + costs[i], row)):
            heapq.heappush(heap, entry)
    return [sorted(row) for row in rows]
