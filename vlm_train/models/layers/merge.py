"""Merge: put media features where the data laid placeholders. The sequence keeps its length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlm_train.contracts.batch import Slots
from vlm_train.errors import BatchError


def merge_features(embeds: Tensor, features: Tensor, slots: Slots, slot_counts: Sequence[int]) -> Tensor:
    """Replace the embeddings at the placeholders by media features.

    Args:
        embeds: `[B, T, D]` text embeddings.
        features: `[F, D]`, the features of all media items, joined item by item (see `check_slots`).
        slots: where they go in this stream.
        slot_counts: features of each item, as the text expects them.

    Returns:
        `[B, T, D]`, a new tensor.

    Raises:
        BatchError: another number of features than expected, or a placeholder that gets none. Numbers only: nothing
            here asks the device.
    """
    if features.shape[0] != sum(slot_counts):
        raise BatchError(f"merge: {features.shape[0]} media features, but the text expects {sum(slot_counts)}")
    if slots.feature_index is not None:
        features = features.index_select(0, slots.feature_index)
    if not slots.placeholders == slots.index.shape[0] == features.shape[0]:
        raise BatchError(
            f"merge: {slots.placeholders} placeholders in the text, but {features.shape[0]} media features for "
            f"{slots.index.shape[0]} of them"
        )
    flat = embeds.flatten(0, 1)
    return flat.index_copy(0, slots.index, features.to(flat.dtype)).view_as(embeds)


def check_slots(feature_counts: Sequence[int], slot_counts: Sequence[int], keys: Sequence[str]) -> None:
    """Raise `BatchError` unless every media item has as many features as the text expects of it.

    Checked item by item: two errors that cancel in the total are found.
    """
    if len(feature_counts) != len(slot_counts):
        raise BatchError(
            f"merge: the tower gave {len(feature_counts)} media items, the text has slots for {len(slot_counts)}"
        )
    for index, (got, expected) in enumerate(zip(feature_counts, slot_counts, strict=True)):
        if got != expected:
            key = keys[index] if index < len(keys) else "?"
            raise BatchError(
                f"merge: media item {index} (sample {key!r}) has {got} image features but {expected} placeholders; "
                "the media layout and the connector disagree"
            )
