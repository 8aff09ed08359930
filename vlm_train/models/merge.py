"""Merge: put image features where the data laid placeholders. The sequence keeps its length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlm_train.errors import BatchError


def merge(
    embeds: Tensor, features: Tensor, slot_index: Tensor, slot_counts: Sequence[int], keys: Sequence[str]
) -> Tensor:
    """Replace the embeddings at the placeholders by image features.

    Args:
        embeds: `[B, T, D]` text embeddings.
        features: `[items, Q, D]`, the tokens of each media item (views already joined), or `[S, D]` if items differ in
            length, in which case their order and lengths are the caller's.
        slot_index: `[S]` flat positions `b * T + t` of the placeholders, item by item.
        slot_counts: placeholders of each item.
        keys: sample key of each item, for the message.

    Returns:
        `[B, T, D]`, a new tensor.

    Raises:
        BatchError: an item has another number of features than placeholders (checked item by item: two errors that
            cancel in the total are found).
    """
    if features.dim() == 3:
        check_slots([features.shape[1]] * features.shape[0], slot_counts, keys)
        features = features.flatten(0, 1)
    elif features.shape[0] != sum(slot_counts):
        raise BatchError(f"merge: {features.shape[0]} image features for {sum(slot_counts)} placeholders in the batch")
    flat = embeds.flatten(0, 1)
    return flat.index_copy(0, slot_index, features.to(flat.dtype)).view_as(embeds)


def check_slots(feature_counts: Sequence[int], slot_counts: Sequence[int], keys: Sequence[str]) -> None:
    """Raise `BatchError` unless every media item has as many features as placeholders."""
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
