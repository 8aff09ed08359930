"""`CrossStates`: what blocks inserted into a language model read.

Legend: M media items, S features an item, B rows, T tokens, R rows of queries, Q queries, D_c width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CrossStates:
    """Media features, and which media item each token of the text may see.

    A rank whose batch has no media passes the features of its blank view, which no token sees, so that every rank makes
    the same collective calls.

    Attributes:
        features: `[M, S, D_c]`, S features of each of M media items, or of each of B rows.
        media_of_token: `[B, T]` integers, the row of `features` that a token sees, or -1: it sees none. A family takes
            it from `TokenStream.media_of_token`.
        query_start: tokens before the first query: those that a key-value cache already holds.
    """

    features: Tensor
    media_of_token: Tensor
    query_start: int = 0

    def media_of_query(self, hidden: Tensor) -> Tensor:
        """What each query of `hidden` `[R, Q, D]` sees, as in `media_of_token` -> `[R, Q]`.

        While text is generated, R is B times the number of beams, and new tokens see what the last token of the prompt
        sees. Prompts are padded on the left.
        """
        rows, queries = hidden.shape[:2]
        last = self.media_of_token.shape[1] - 1
        columns = torch.arange(self.query_start, self.query_start + queries, device=hidden.device).clamp(max=last)
        seen = self.media_of_token.index_select(1, columns)
        return seen.repeat_interleave(rows // len(seen), dim=0)

    def attention_mask(self, hidden: Tensor) -> Tensor:
        """Boolean mask `[R, 1, Q, M * S]` over the features of all items, True where a query may attend.

        A query that sees no item attends to the first: no row is empty, and kernels give no NaN. Multiply the
        output by `sees_media`.
        """
        items, size = self.features.shape[:2]
        item_of_key = torch.arange(items, device=hidden.device).repeat_interleave(size, output_size=items * size)
        return (self.media_of_query(hidden).clamp(min=0)[..., None] == item_of_key)[:, None]

    def sees_media(self, hidden: Tensor) -> Tensor:
        """`[R, Q, 1]` in the dtype of `hidden`: 1 where a query sees a media item, else 0."""
        return (self.media_of_query(hidden) >= 0)[..., None].to(hidden.dtype)

    def reorder_tokens(self, order: Tensor) -> CrossStates:
        """The states for a text whose tokens are reordered by `order` `[B, T]`."""
        return replace(self, media_of_token=self.media_of_token.gather(1, order))
