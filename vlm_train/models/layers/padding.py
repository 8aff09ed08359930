"""Rows of text that are padded on either side: right while training, left for generation.

Legend: B rows, T tokens. `token_mask` `[B, T]` is True where a token is no padding.
"""

from __future__ import annotations

from torch import Tensor


def first_token_index(token_mask: Tensor) -> Tensor:
    """Index `[B, 1]` of the first real token of each row."""
    return token_mask.int().argmax(dim=1, keepdim=True)


def replace_first_token(ids: Tensor, token_mask: Tensor, start: int) -> Tensor:
    """Ids `[B, T]` with `start` in place of the first real token of each row."""
    return ids.scatter(1, first_token_index(token_mask), start)


def position_ids_from_mask(token_mask: Tensor) -> Tensor:
    """Positions `[B, T]`, counted from the first real token."""
    return (token_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def first_token_state(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """The hidden state `[B, D]` of the first real token of each row, of `[B, T, D]`."""
    return hidden.gather(1, first_token_index(token_mask)[..., None].expand(-1, -1, hidden.shape[-1]))[:, 0]
