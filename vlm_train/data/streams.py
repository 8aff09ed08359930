"""Token streams: tokenised conversations -> one stream with labels, positions and attention groups.

Several independent annotations of one image become one stream: a shared prefix (group 0) that ends with the last media
token that all of them begin with, and one private branch (group 1, 2, ...) for the rest of each annotation, its own
media included; all branches start at the position after the prefix. Without common media the prefix is just the bos
token. A branch's first token would be predicted by the last token of the prefix, whose one label cannot serve several
branches, so with several branches it must not be learned.

Legend: A position axes (1, or 3 for M-RoPE), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from vlm_train.data.layout import Slot
from vlm_train.errors import ConfigError

IGNORE = -100  # the same number as vlm_train.data.batch.IGNORE, which needs torch


@dataclass(frozen=True, slots=True)
class PlacedSlot:
    """A run of placeholders and where it starts in the stream.

    `offset` is the first feature of the item that it shows: a layout may spread an item over several runs.
    """

    start: int
    slot: Slot
    offset: int = 0

    @property
    def end(self) -> int:
        """Position after its last placeholder."""
        return self.start + self.slot.count


class Positions(Protocol):
    """Position ids `[A, T]` of a conversation of `length` tokens (M-RoPE: A = 3); without one they count from 0."""

    def __call__(self, length: int, slots: Sequence[PlacedSlot]) -> NDArray[np.int64]: ...


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One token stream of a sample. All arrays but `positions` are `[T]`.

    Attributes:
        ids: int64; placeholders are `PLACEHOLDER_ID`.
        labels: int64; `labels[t]` is the target of position t (its branch's next token), `IGNORE` if not learned.
        weights: float32 weight of every target: annotation x turn x text segment; 0 where ignored.
        positions: int64 `[A, T]`; every branch goes on where the prefix ends.
        attention_group: int32; 0 the prefix (or all of a single annotation), 1, 2, ... the branches.
        slots: where media stand, from left to right; an item may stand in several places.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    attention_group: NDArray[np.int32]
    slots: tuple[PlacedSlot, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of learned targets."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Tokens:
    """A tokenised conversation: ids and, aligned with them, the loss weight of each token as a target `[T]`.

    `ends` are the lengths at which a shared prefix may end: after the bos token (0 without one) and after every media
    item. `positions` is `[A, T]`; None: one axis that counts from 0.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    slots: list[PlacedSlot]
    ends: list[int]
    positions: NDArray[np.int64] | None = None


def _shift(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels and weights aligned with the inputs: position t learns token t + 1."""
    labels, weights = np.full(len(tokens.ids), IGNORE, np.int64), np.zeros(len(tokens.ids), np.float32)
    weights[:-1] = tokens.weights[1:]
    learned = np.flatnonzero(weights > 0)
    labels[learned] = tokens.ids[learned + 1]
    return labels, weights


def single(tokens: Tokens) -> Stream:
    """One conversation as a stream without branches."""
    labels, weights = _shift(tokens)
    size = len(tokens.ids)
    return Stream(
        ids=tokens.ids,
        labels=labels,
        weights=weights,
        positions=np.arange(size, dtype=np.int64)[None] if tokens.positions is None else tokens.positions,
        attention_group=np.zeros(size, np.int32),
        slots=tuple(tokens.slots),
    )


def branch(parts: Sequence[Tokens]) -> Stream:
    """Several conversations as one shared prefix and private branches."""
    size = _shared(parts)
    if any((part.weights[1 : size + 1] > 0).any() for part in parts):
        raise ConfigError(
            "this template learns the token right after the image, which only one annotation an image can do; set "
            "data.annotations to first"
        )
    singles = [single(part) for part in parts]

    def joined(name: str) -> Any:
        arrays = [getattr(one, name) for one in singles]
        return np.concatenate([arrays[0][..., :size], *(array[..., size:] for array in arrays)], axis=-1)

    groups = [np.zeros(size, np.int32), *(np.full(len(s) - size, n, np.int32) for n, s in enumerate(singles, 1))]
    slots, start = [s for s in singles[0].slots if s.start < size], size
    for one in singles:
        slots += [replace(s, start=s.start - size + start) for s in one.slots if s.start >= size]
        start += len(one) - size
    return Stream(
        ids=joined("ids"),
        labels=joined("labels"),
        weights=joined("weights"),
        positions=joined("positions"),
        attention_group=np.concatenate(groups),
        slots=tuple(slots),
    )


def _shared(parts: Sequence[Tokens]) -> int:
    """Length of the longest prefix, up to a place where one may end, that all conversations have in common."""
    first = parts[0]

    def same(end: int) -> bool:
        slots = [s for s in first.slots if s.start < end]
        return all(
            end in p.ends
            and np.array_equal(p.ids[:end], first.ids[:end])
            and [s for s in p.slots if s.start < end] == slots
            for p in parts[1:]
        )

    return next((end for end in reversed(first.ends) if same(end)), 0)


def fit(stream: Stream, max_length: int | None, over_length: str) -> Stream:
    """The stream within `max_length` tokens."""
    if max_length is None or len(stream) <= max_length:
        return stream
    message = f"{len(stream)} tokens, but data.max_length is {max_length}"
    if over_length == "error":
        raise ConfigError(f"{message} (data.over_length=error)")
    if over_length in ("drop", "split"):  # split: the rejected answer, which is cut nowhere
        raise BadSample(message, kind="too_long")
    if stream.slots and stream.slots[-1].end > max_length:
        cut = f"{message}, and cutting there would cut an image that ends at token {stream.slots[-1].end}"
        raise BadSample(cut, kind="too_long")
    names = ("ids", "labels", "weights", "positions", "attention_group")
    kept = {name: getattr(stream, name)[..., :max_length].copy() for name in names}
    kept["labels"][-1], kept["weights"][-1] = IGNORE, 0.0  # its target was cut off
    return Stream(**kept, slots=stream.slots)


def learned(stream: Stream) -> Stream:
    """`stream` itself. Raises `BadSample` if it learns nothing."""
    if not stream.supervised:
        raise BadSample(f"no supervised token in {len(stream)} tokens", kind="unsupervised")
    return stream
