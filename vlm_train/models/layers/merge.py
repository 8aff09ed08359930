"""Merge: put media features where the data laid placeholders. The sequence keeps its length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from vlm_train.contracts.batch import MediaBatch, Slots
from vlm_train.contracts.media import Features
from vlm_train.errors import BatchError


def merge_features(
    embeds: Tensor, features: Features, view_counts: Sequence[int], slots: Slots, media: MediaBatch
) -> Tensor:
    """Replace the embeddings at the placeholders by media features.

    Without images this merges an empty slice: the features of the blank view stay in the graph, with gradients of zero,
    so that every rank makes the same collective calls in backward.

    Args:
        embeds: `[B, T, D]` text embeddings.
        features: of width D, those of every view; views that belong to no media item come last.
        view_counts: views of each media item.
        slots: where the features go in this stream.
        media: how many features the text expects of each item.

    Returns:
        `[B, T, D]`, a new tensor.

    Raises:
        BatchError: features of another width than the embeddings, an item with another number of features than the text
            expects, or a placeholder that gets none. Every item is checked, so that errors that cancel in the total are
            found. Numbers only: nothing here asks the device.
    """
    if len(view_counts) != len(media.slot_counts):
        raise BatchError(
            f"merge: the tower gave {len(view_counts)} media items, the text has slots for {len(media.slot_counts)}"
        )
    of_views = iter(features.lengths)
    for index, (views, expected) in enumerate(zip(view_counts, media.slot_counts, strict=True)):
        if (got := sum(islice(of_views, views))) != expected:
            key = media.keys[index] if index < len(media.keys) else "?"
            raise BatchError(
                f"merge: media item {index} (sample {key!r}) has {got} image features but {expected} placeholders; "
                "the media layout and the connector disagree"
            )
    if (width := features.values.shape[-1]) != embeds.shape[-1]:
        raise BatchError(
            f"merge: the connector gave features of width {width}, the language model has width {embeds.shape[-1]}"
        )
    values = features.values[: sum(media.slot_counts)]
    if slots.feature_index is not None:
        values = values.index_select(0, slots.feature_index)
    if not slots.placeholders == slots.index.shape[0] == values.shape[0]:
        raise BatchError(
            f"merge: {slots.placeholders} placeholders in the text, but {values.shape[0]} media features for "
            f"{slots.index.shape[0]} of them"
        )
    flat = embeds.flatten(0, 1)
    return flat.index_copy(0, slots.index, values.to(flat.dtype)).view_as(embeds)
