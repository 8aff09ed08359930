"""Vocabulary tables with a row for the image token, which our models do without."""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = 64
"""Longer tables are filled up to this, as in the published LLaVA conversions."""


def rows_with(image_token_id: int, vocab_size: int) -> int:
    """Rows of a table that also has the image token."""
    if image_token_id < vocab_size:
        return vocab_size
    return -(-(image_token_id + 1) // MULTIPLE) * MULTIPLE


def pad_rows(table: Tensor, rows: int) -> Tensor:
    """`[V, ...]` -> `[rows, ...]`, with mean rows at the end."""
    if rows == len(table):
        return table
    return torch.cat([table, table.mean(dim=0, keepdim=True).expand(rows - len(table), *table.shape[1:])])
