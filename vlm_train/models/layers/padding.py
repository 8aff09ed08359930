"""Rows of text that are padded on either side: right while training, left for generation.

Legend: B rows, T tokens. `real` `[B, T]` is True where a token is no padding.
"""

from __future__ import annotations

from torch import Tensor


def first_real(real: Tensor) -> Tensor:
    """Index `[B, 1]` of the first real token of each row."""
    return real.int().argmax(dim=1, keepdim=True)


def replace_first_token(ids: Tensor, real: Tensor, start: int) -> Tensor:
    """Ids `[B, T]` with `start` in place of the first real token of each row."""
    return ids.scatter(1, first_real(real), start)


def position_ids_from_mask(real: Tensor) -> Tensor:
    """Positions `[B, T]`, counted from the first real token."""
    return (real.long().cumsum(dim=1) - 1).clamp(min=0)


def first_token_state(hidden: Tensor, real: Tensor) -> Tensor:
    """The hidden state `[B, D]` of the first real token of each row, of `[B, T, D]`."""
    return hidden.gather(1, first_real(real)[..., None].expand(-1, -1, hidden.shape[-1]))[:, 0]
