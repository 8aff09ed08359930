"""Rendered samples -> `Batch`. Padding to the right for training, to the left for generation.

Normalisation (`batch.normalise`) becomes per-target weights here: the loss is always sum(weight x nll) / sum(weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm_train.data.batch import IGNORE, Batch, MediaBatch, TokenStream, Window
from vlm_train.data.render import Rendered
from vlm_train.data.streams import Stream

Views = list[np.ndarray]


@dataclass(frozen=True)
class Item:
    """One sample ready for a batch: its streams, and per media item its uint8 views `[V, 3, H, W]`."""

    rendered: Rendered
    views: Views
    source: str = ""
    weight: float = 1.0


def collate(
    items: Sequence[Item],
    image_size: tuple[int, int],
    *,
    normalise: str = "token",
    window: Window | None = None,
    left: bool = False,
) -> Batch:
    """One row per item. An empty list gives one padding row, so that every rank always makes the same calls."""
    names = list(items[0].rendered.streams) if items else ["llm"]
    text = {
        name: _stream([i.rendered.streams[name] for i in items], [i.weight for i in items], normalise, left)
        for name in names
    }
    width = text[names[0]].ids.shape[1]
    return Batch(
        text=text,
        media=_media(items, names[0], width, image_size, left),
        window=window,
        sources=tuple((i.source,) for i in items) or ((),),
        keys=tuple((i.rendered.key,) for i in items) or ((),),
        references=tuple(i.rendered.reference for i in items),
    )


def collate_prompts(items: Sequence[tuple[Rendered, Views]], image_size: tuple[int, int]) -> Batch:
    """A batch of generation prompts, padded on the left."""
    return collate([Item(rendered, views) for rendered, views in items], image_size, left=True)


def target_weights(stream: Stream, normalise: str, weight: float) -> np.ndarray:
    """Weight of every target `[T]` under a normalisation rule: each target alike (token, source), each sample alike
    (sample), or in between (sqrt_length: InternVL 2.5, 1 / sqrt(targets))."""
    raw = stream.weights * np.float32(weight)
    if normalise == "sample":
        return raw / max(float(stream.weights.sum()), 1e-8)
    if normalise == "sqrt_length":
        return raw / max(float(stream.supervised), 1.0) ** 0.5
    return raw


def _stream(streams: Sequence[Stream], weights: Sequence[float], normalise: str, left: bool) -> TokenStream:
    rows, width = max(len(streams), 1), max((len(s) for s in streams), default=1)
    ids = np.zeros((rows, width), np.int64)
    labels = np.full((rows, width), IGNORE, np.int64)
    target = np.zeros((rows, width), np.float32)
    positions = np.zeros((1, rows, width), np.int64)
    segments, groups = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, (stream, weight) in enumerate(zip(streams, weights, strict=True)):
        where = slice(width - len(stream), width) if left else slice(0, len(stream))
        ids[row, where], labels[row, where] = stream.ids, stream.labels
        target[row, where] = target_weights(stream, normalise, weight)
        positions[0, row, where], groups[row, where] = stream.positions, stream.attention_group
        segments[row, where] = 1
    return TokenStream(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(target),
        positions=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segments),
        attention_group=torch.from_numpy(groups),
        supervised=torch.from_numpy(np.flatnonzero(labels.reshape(-1) != IGNORE)),
    )


def _media(items: Sequence[Item], name: str, width: int, image_size: tuple[int, int], left: bool) -> MediaBatch:
    pixels, view_counts, slot_counts, index, rows, keys = [], [], [], [], [], []
    for row, item in enumerate(items):
        stream = item.rendered.streams[name]
        start = row * width + (width - len(stream) if left else 0)
        slots = {placed.slot.item: placed for placed in stream.slots}
        for number, views in enumerate(item.views):
            placed = slots.get(number)
            pixels.append(views)
            view_counts.append(len(views))
            slot_counts.append(placed.slot.count if placed else 0)
            rows.append(row)
            keys.append(item.rendered.key)
            if placed:
                index.append(np.arange(start + placed.start, start + placed.end))
    blank = np.zeros((1, 3, *image_size), np.uint8)
    return MediaBatch(
        pixels=torch.from_numpy(np.concatenate(pixels) if pixels else blank),
        view_counts=tuple(view_counts),
        slot_counts=tuple(slot_counts),
        slot_index=_index(np.concatenate(index) if index else np.zeros(0)),
        row=_index(np.asarray(rows)),
        keys=tuple(keys),
    )


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
