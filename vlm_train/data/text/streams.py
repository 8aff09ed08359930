"""Token streams: tokenized conversations -> one stream with labels, positions and attention groups.

Several independent annotations of one image become one stream: a shared prefix (group 0) that ends with the last media
token that all of them begin with, and one private branch (group 1, 2, ...) for the rest of each annotation, its own
media included; all branches start at the position after the prefix. Without common media the prefix is just the bos
token. A branch's first token would be predicted by the last token of the prefix, whose one label cannot serve several
branches, so with several branches it must not be learned.

An encoder-decoder reads two streams: the prompt, whose tokens see each other in both directions, and the answer, whose
labels are aligned `seq2seq`: position t learns token t, and its input is the token before.

Legend: A position axes (1, or 3 for M-RoPE), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from vlm_train.contracts.layout import Slot
from vlm_train.contracts.streams import Alignment
from vlm_train.errors import ConfigError

IGNORE = -100  # the same number as vlm_train.contracts.batch.IGNORE, which needs torch
BIDIRECTIONAL = -1  # attention group of one block whose tokens see each other in both directions


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
        labels: int64; `labels[t]` is the target of position t (causal: its branch's next token), `IGNORE` if not
            learned.
        weights: float32 weight of every target: annotation x turn x text segment; 0 where ignored.
        positions: int64 `[A, T]`; every branch goes on where the prefix ends.
        attention_group: int32; 0 the prefix (or all of a single annotation), 1, 2, ... the branches, -1 what is read in
            both directions: a whole stream, or the media of a sample.
        slots: where media stand, from left to right; an item may stand in several places.
        alignment: how labels relate to ids, see `TokenStream`.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    attention_group: NDArray[np.int32]
    slots: tuple[PlacedSlot, ...] = ()
    alignment: Alignment = "causal"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of learned targets."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Tokens:
    """A tokenized conversation: ids and, aligned with them, the loss weight of each token as a target `[T]`.

    `ends` are the lengths at which a shared prefix may end: after the bos token (0 without one) and after every media
    item, and every view of one that has a run of its own. `positions` is `[A, T]`; None: one axis that counts from 0.
    `both_ways` are the ids of tokens that see each other in both directions, up to the next learned token.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    slots: list[PlacedSlot]
    ends: list[int]
    positions: NDArray[np.int64] | None = None
    both_ways: tuple[int, ...] = ()


def causal_stream(tokens: Tokens) -> Stream:
    """One conversation as a stream without branches: position t learns token t + 1."""
    size = len(tokens.ids)
    labels, weights = np.full(size, IGNORE, np.int64), np.zeros(size, np.float32)
    weights[:-1] = tokens.weights[1:]
    learned = np.flatnonzero(weights > 0)
    labels[learned] = tokens.ids[learned + 1]
    both_ways = np.isin(tokens.ids, tokens.both_ways)
    answers = np.cumsum(tokens.weights > 0)[both_ways]  # a block over an answer would show it to what comes before
    groups = np.zeros(size, np.int32)
    groups[both_ways] = BIDIRECTIONAL - np.unique(answers, return_inverse=True)[1]
    return Stream(
        ids=tokens.ids,
        labels=labels,
        weights=weights,
        positions=np.arange(size, dtype=np.int64)[None] if tokens.positions is None else tokens.positions,
        attention_group=groups,
        slots=tuple(tokens.slots),
    )


def encoder_stream(tokens: Tokens) -> Stream:
    """A text that is only read, in both directions: nothing is learned."""
    whole = causal_stream(replace(tokens, weights=np.zeros_like(tokens.weights)))
    return replace(whole, attention_group=np.full(len(whole), BIDIRECTIONAL, np.int32), alignment="none")


def decoder_stream(tokens: Tokens, start: int) -> Stream:
    """An answer as the decoder's stream: its input begins with `start`, its labels are the tokens."""
    ids = np.concatenate([np.array([start], np.int64), tokens.ids])[: len(tokens.ids)]
    labels = np.where(tokens.weights > 0, tokens.ids, IGNORE)
    return replace(causal_stream(replace(tokens, ids=ids)), labels=labels, weights=tokens.weights, alignment="seq2seq")


def branched_stream(parts: Sequence[Tokens]) -> Stream:
    """Several conversations as one shared prefix and private branches."""
    size = _shared_length(parts)
    if any((part.weights[1 : size + 1] > 0).any() for part in parts):
        raise ConfigError(
            "this template learns the token right after the image, which only one annotation an image can do; set "
            "data.annotations to first"
        )
    singles = [causal_stream(part) for part in parts]
    if any(one.attention_group[size:].any() for one in singles):
        raise BadSample(
            "several annotations show media of their own, which would have to see each other in both directions; set "
            "data.annotations to dialogue, first or drawn",
            kind="template",
        )

    def join_arrays(name: str) -> Any:
        arrays = [getattr(one, name) for one in singles]
        return np.concatenate([arrays[0][..., :size], *(array[..., size:] for array in arrays)], axis=-1)

    shared = singles[0].attention_group[:size]
    groups = [shared, *(np.full(len(s) - size, n, np.int32) for n, s in enumerate(singles, 1))]
    slots, start = [s for s in singles[0].slots if s.start < size], size
    for one in singles:
        slots += [replace(s, start=s.start - size + start) for s in one.slots if s.start >= size]
        start += len(one) - size
    return Stream(
        ids=join_arrays("ids"),
        labels=join_arrays("labels"),
        weights=join_arrays("weights"),
        positions=join_arrays("positions"),
        attention_group=np.concatenate(groups),
        slots=tuple(slots),
    )


def _shared_length(parts: Sequence[Tokens]) -> int:
    """Length of the longest prefix, up to a place where one may end, that all conversations have in common."""
    first = parts[0]

    def agree_until(end: int) -> bool:
        slots = [s for s in first.slots if s.start < end]
        return all(
            end in p.ends
            and np.array_equal(p.ids[:end], first.ids[:end])
            and [s for s in p.slots if s.start < end] == slots
            for p in parts[1:]
        )

    return next((end for end in reversed(first.ends) if agree_until(end)), 0)


def truncate_stream(stream: Stream, max_length: int | None, over_length: str, *, keep_end: bool = False) -> Stream:
    """The stream within `max_length` tokens; with `keep_end` an answer keeps its last token, which ends the text."""
    if max_length is None or len(stream) <= max_length:
        return stream
    message = f"{len(stream)} tokens, but data.max_length is {max_length}"
    if over_length == "error":
        raise ConfigError(f"{message} (data.over_length=error)")
    if over_length in ("drop", "split"):  # split: the rejected answer, which is cut nowhere
        raise BadSample(message, kind="too_long")
    last = max((placed.start + max(placed.slot.count, 1) for placed in stream.slots), default=0)
    keep_end = keep_end and stream.alignment != "none" and not stream.attention_group[-1] > 0  # no branch has the end
    if last + keep_end > max_length:  # a token has to be left that sees an image without placeholders
        cut = f"{message}, and cutting there would cut an image that ends at token {last}"
        raise BadSample(cut, kind="too_long")
    tokens = np.arange(max_length)
    if stream.alignment == "none":  # a prompt loses the beginning of its text
        tokens[last:] += len(stream) - max_length
    kept = {name: getattr(stream, name)[tokens] for name in ("ids", "labels", "weights", "attention_group")}
    kept["positions"] = stream.positions[:, :max_length].copy()
    if stream.alignment == "causal":
        kept["labels"][-1], kept["weights"][-1] = IGNORE, 0.0  # its target was cut off
        if keep_end:
            kept["ids"][-1] = stream.ids[-1]
            kept["labels"][-2:-1], kept["weights"][-2:-1] = stream.labels[-2], stream.weights[-2]
    elif keep_end:
        kept["labels"][-1], kept["weights"][-1] = stream.labels[-1], stream.weights[-1]
    return replace(stream, **kept)
