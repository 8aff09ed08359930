"""Tokenized samples -> `Batch`. Padding to the right for training, to the left for generation.

Normalization (`batch.normalize`) becomes per-target weights here: the loss is always sum(weight x nll) / sum(weight).
`source` needs the sums of all ranks, so `vlm_train.data.source_weights` multiplies its weights later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from data_pipelines.shards.top_tokens import TopTokens
from vlm_train.contracts.batch import (
    IGNORE,
    Batch,
    MediaBatch,
    PackedSequences,
    Slots,
    TokenStream,
    TopTokenBatch,
    Window,
)
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import MediaInput
from vlm_train.data.images.plan import ImagePlan, MediaViews, Views, join_fields
from vlm_train.data.text.render import TokenizedSample
from vlm_train.data.text.streams import Stream
from vlm_train.errors import BatchError


@dataclass(frozen=True)
class Example:
    """One sample ready for a batch: its streams, and what every encoder is given of each of its media items.

    Items beyond `rendered.media` are not looked at and may be None; a model without a tower is given none at all.
    """

    rendered: TokenizedSample
    views: MediaViews
    source: str = ""
    weight: float = 1.0
    columns: Mapping[str, float] = field(default_factory=dict)
    top_tokens: Mapping[str, tuple[TopTokens, int]] = field(default_factory=dict)  # and the vocabulary's size


def collate_rows(
    rows: Sequence[Sequence[Example]],
    plans: Mapping[str, ImagePlan],
    *,
    streams: Sequence[str] = ("llm",),
    columns: Sequence[str] = (),
    top_tokens: Sequence[str] = (),
    normalize: str = "token",
    window: Window | None = None,
    left: bool = False,
) -> Batch:
    """Rows of one or several samples. No rows give one row of padding, so that every rank makes the same calls.

    A packed row holds its samples one after the other, each a segment with positions of its own. `plans` are those that
    made the views: a batch without media is given their blank ones.

    Raises:
        BatchError: items with different streams, or a placeholder that no given view would fill. Names the sample.
    """
    items = [item for row in rows for item in row]
    names = list(items[0].rendered.streams) if items else list(streams)
    for item in items:
        if list(item.rendered.streams) != names:
            raise BatchError(
                f"collate: sample {item.rendered.key!r} has the streams {', '.join(item.rendered.streams)}, but "
                f"{items[0].rendered.key!r} has {', '.join(names)}; all samples of a batch need the same"
            )
    media, numbers = _collate_media(rows, plans)
    return Batch(
        text={name: _collate_stream(rows, name, numbers, media.slot_counts, normalize, left) for name in names},
        media=media,
        window=window,
        sources=tuple(tuple(item.source for item in row) for row in rows) or ((),),
        keys=tuple(tuple(item.rendered.key for item in row) for row in rows) or ((),),
        references=tuple(item.rendered.reference for item in items),
        columns={name: torch.tensor([item.columns[name] for item in items]) for name in columns},
        top_tokens={name: join_top_tokens([item.top_tokens[name] for item in items]) for name in top_tokens},
    )


def join_top_tokens(items: Sequence[tuple[TopTokens, int]]) -> TopTokenBatch:
    """What a teacher says of the tokens of several samples, one after the other; without any, of no token."""
    if not items:
        return TopTokenBatch(ids=torch.zeros(0, 1, dtype=torch.int64), logps=torch.zeros(0, 1))
    return TopTokenBatch(
        ids=torch.from_numpy(np.concatenate([one.ids for one, _ in items]).astype(np.int64)),
        logps=torch.from_numpy(np.concatenate([one.logps for one, _ in items]).astype(np.float32)),
        vocab_size=items[0][1],
    )


def collate_prompts(items: Sequence[tuple[TokenizedSample, MediaViews]], plans: Mapping[str, ImagePlan]) -> Batch:
    """A batch of generation prompts, padded on the left."""
    return collate_rows([[Example(rendered, views)] for rendered, views in items], plans, left=True)


def _collate_media(
    rows: Sequence[Sequence[Example]], plans: Mapping[str, ImagePlan]
) -> tuple[MediaBatch, dict[tuple[int, int], int]]:
    """The media that the model is given, those of which every encoder has views; and the number of each,
    `(sample, item) -> number`. An item has as many features as the slots of all streams want."""
    items = [item for row in rows for item in row]
    row_of = [number for number, row in enumerate(rows) for _ in row]
    given = [min(map(len, item.views.values()), default=0) for item in items]
    shown = [(sample, n) for sample, item in enumerate(items) for n in item.rendered.media if n < given[sample]]
    numbers = {one: number for number, one in enumerate(shown)}
    counts = [0] * len(numbers)
    for sample, item in enumerate(items):
        for stream in item.rendered.streams.values():
            for placed in stream.slots:
                if (at := numbers.get((sample, placed.slot.item))) is None:
                    raise BatchError(
                        f"collate: sample {item.rendered.key!r}: media item {placed.slot.item} has "
                        f"{placed.slot.count} placeholders, but 0 views ({given[sample]} media items were given)"
                    )
                counts[at] = max(counts[at], placed.offset + placed.slot.count)
    inputs = {}
    for name, plan in plans.items():
        found = (items[sample].views[name][n] for sample, n in numbers)
        inputs[name] = join_views([views for views in found if views is not None], plan)
    media = MediaBatch(
        inputs=inputs,
        slot_counts=tuple(counts),
        row=torch.tensor([row_of[sample] for sample, _ in numbers], dtype=torch.int64),
        keys=tuple(items[sample].rendered.key for sample, _ in numbers),
    )
    return media, numbers


def join_views(items: Sequence[Views], plan: ImagePlan) -> MediaInput:
    """What an encoder is given of several media items; without any, one blank view of its plan. In a loader process
    the pixels are put into memory that it shares, where they go anyway."""
    parts = items or [plan.blank()]
    arrays = [views.values for views in parts]
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    joined = torch.from_numpy(np.empty(0, arrays[0].dtype))
    if get_worker_info() is None:
        joined = joined.new_empty(shape)
    else:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * joined.element_size())
        joined = joined.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
    np.concatenate(arrays, out=joined.numpy())
    fields = join_fields([views.fields for views in parts]) if any(views.fields for views in parts) else {}
    return MediaInput(
        values=joined,
        grids=tuple(grid for views in parts for grid in views.grids),
        view_counts=tuple(len(views.grids) for views in items),
        shapes=tuple(views.shape for views in items),
        fields={name: torch.from_numpy(one) for name, one in fields.items()},
        field_counts={name: tuple(len(views.fields.get(name, ())) for views in parts) for name in fields},
    )


def target_weights(stream: Stream, normalize: str, weight: float) -> np.ndarray:
    """Weight of every target `[T]` under a normalization rule: each target alike (token; source, inside a source), each
    sample alike (sample), or in between (sqrt_length: InternVL 2.5, 1 / sqrt(targets))."""
    raw = stream.weights * np.float32(weight)
    if normalize == "sample":
        return raw / max(float(stream.weights.sum()), 1e-8)
    if normalize == "sqrt_length":
        return raw / max(float(stream.supervised), 1.0) ** 0.5
    return raw


class _PlacedStream(NamedTuple):
    """A sample's stream in its row: `sample` and `row` are numbers in the batch, `segment` counts from 1 in the row."""

    sample: int
    row: int
    segment: int
    start: int
    stream: Stream
    item: Example


def _place_streams(
    rows: Sequence[Sequence[Example]], name: str, left: bool
) -> tuple[list[_PlacedStream], int, PackedSequences | None, PackedSequences | None]:
    """Where every sample's stream `name` begins in its row, and how wide the rows are; where attention is causal
    (samples of group 0, and padding), and where attention groups need a mask."""
    width = max((sum(len(item.rendered.streams[name]) for item in row) for row in rows), default=1)
    placed, causal, masked = list[_PlacedStream](), list[tuple[int, int]](), list[tuple[int, int]]()
    for number, row in enumerate(rows or [[]]):
        start, first = 0, number * width
        if left and (start := width - sum(len(item.rendered.streams[name]) for item in row)):
            causal.append((first, start))
        for segment, item in enumerate(row, start=1):
            stream = item.rendered.streams[name]
            placed.append(_PlacedStream(len(placed), number, segment, start, stream, item))
            if len(stream):
                (masked if stream.attention_group.any() else causal).append((first + start, len(stream)))
            start += len(stream)
        if start < width:
            causal.append((first + start, width - start))
    total = max(len(rows), 1) * width
    alone, grouped = (pack_sequences(spans, total) if spans else None for spans in (causal, masked))
    return placed, width, alone, grouped


def _collate_stream(
    rows: Sequence[Sequence[Example]],
    name: str,
    numbers: Mapping[tuple[int, int], int],
    slot_counts: Sequence[int],
    normalize: str,
    left: bool,
) -> TokenStream:
    placed, width, causal, masked = _place_streams(rows, name, left)
    count, axes = max(len(rows), 1), max((len(one.stream.positions) for one in placed), default=1)
    ids = np.zeros((count, width), np.int64)
    labels = np.full((count, width), IGNORE, np.int64)
    weights = np.zeros((count, width), np.float32)
    positions = np.zeros((axes, count, width), np.int64)
    segments, groups = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    media = np.full((count, width), -1, np.int64)
    for sample, row, segment, start, stream, item in placed:
        where = slice(start, start + len(stream))
        ids[row, where], labels[row, where] = stream.ids, stream.labels
        weights[row, where] = target_weights(stream, normalize, item.weight)
        positions[:, row, where], groups[row, where] = stream.positions, stream.attention_group
        segments[row, where] = segment
        for slot in sorted(stream.slots, key=lambda slot: slot.start):  # tokens behind it that may see it
            group, later = stream.attention_group[slot.start : slot.start + 1], np.arange(len(stream)) >= slot.start
            sees = later & ((group <= 0) | (stream.attention_group == group))
            media[row, where][sees] = numbers[sample, slot.slot.item]
    return TokenStream(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segments),
        attention_group=torch.from_numpy(groups),
        slots=_collate_slots(placed, name, numbers, slot_counts, ids),
        alignment=placed[0].stream.alignment if placed else "causal",
        supervised=torch.from_numpy(np.flatnonzero(labels.reshape(-1) != IGNORE)),
        plain_causal=masked is None and all(len(row) == 1 for row in rows) and not any(one.start for one in placed),
        causal=causal,
        masked=masked,
        sample_lengths=tuple(tuple(len(item.rendered.streams[name]) for item in row) for row in rows),
        media_of_token=torch.from_numpy(media),
    )


def pack_sequences(spans: Sequence[tuple[int, int]], total: int) -> PackedSequences:
    """The sequences at `spans` (start, length), not empty, of a batch of `total` tokens read row after row."""
    lengths = tuple(length for _, length in spans)
    index = None
    if sum(lengths) < total:
        index = torch.cat([torch.arange(start, start + length) for start, length in spans])
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSequences(lengths=lengths, max_length=max(lengths), cu_seqlens=cu_seqlens, index=index)


def _collate_slots(
    placed: Sequence[_PlacedStream],
    name: str,
    numbers: Mapping[tuple[int, int], int],
    slot_counts: Sequence[int],
    ids: np.ndarray,
) -> Slots:
    """Which feature goes to which position of the rows `ids` [B, T], laid flat."""
    none, starts = np.zeros(0, np.int64), [*accumulate(slot_counts, initial=0)]
    places, features = [none], [none]
    for sample, row, _, start, stream, item in placed:
        runs = np.concatenate([none, *(np.arange(slot.start, slot.end) for slot in stream.slots)])
        expected = np.flatnonzero(stream.ids == PLACEHOLDER_ID)
        if not np.array_equal(np.sort(runs), expected):
            raise BatchError(
                f"collate: sample {item.rendered.key!r}, stream {name!r}: the text has {len(expected)} "
                f"placeholders, but not where its slots say that {len(runs)} are"
            )
        places.append(row * ids.shape[1] + start + runs)
        for slot in stream.slots:
            first = starts[numbers[sample, slot.slot.item]] + slot.offset
            features.append(np.arange(first, first + slot.slot.count))
    wanted = np.concatenate(features)
    in_order = np.array_equal(wanted, np.arange(starts[-1]))
    return Slots(
        index=torch.from_numpy(np.concatenate(places)),
        feature_index=None if in_order else torch.from_numpy(wanted),
        placeholders=int((ids == PLACEHOLDER_ID).sum()),
    )
