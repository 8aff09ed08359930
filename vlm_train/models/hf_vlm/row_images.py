"""Images of models that attend to them row by row, as Llama 3.2 Vision.

Legend: B rows, T tokens, I most images of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.media import MediaInput

CROSS_MASK = "cross_attention_mask"
"""The argument that says which token sees which image."""


def spread_over_rows(shown: MediaInput, row_of: Sequence[int], ids: Tensor, image_id: int) -> dict[str, Any]:
    """The fields of all images as `[B, I, tiles, ...]`, and the mask `[B, T, I, tiles]`, as the library's processor
    makes them for a batch. In `shown` every image has an entry of its own, `[1, tiles, ...]`.

    Args:
        row_of: the row of every media item.
        ids: `[B, T]`, with `image_id` where an image stands.
    """
    from transformers.models.mllama import processing_mllama as library

    rows, length = ids.shape
    counts = shown.field_counts["pixel_values"]
    numbers = [row for row, count in zip(row_of, counts, strict=True) for _ in range(count)]
    most = max(numbers.count(row) for row in set(numbers))
    places = [row * most + numbers[:place].count(row) for place, row in enumerate(numbers)]
    index, found = torch.tensor(places, device=ids.device), dict[str, Any]()
    for name, values in shown.fields.items():
        if name == "num_tiles":
            continue
        empty = values.new_zeros(rows * most, *values.shape[2:])
        if name == "aspect_ratio_mask":
            empty[:, 0] = 1  # of a missing image, as the library fills up
        found[name] = empty.index_copy(0, index, values[:, 0]).unflatten(0, (rows, most))
    tiles = shown.fields["num_tiles"].flatten().tolist()
    held = [[int(one) for one, at in zip(tiles, numbers, strict=True) if at == row] for row in range(rows)]
    spans = [library.get_cross_attention_token_mask(one, image_id) for one in ids.tolist()]
    width = found["pixel_values"].shape[2]
    mask = library.convert_sparse_cross_attention_mask_to_dense(spans, held, width, length)
    found[CROSS_MASK] = torch.from_numpy(mask).to(ids.device)
    return found
