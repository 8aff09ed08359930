"""A family whose images stay out of the text: gated cross-attention blocks between the layers of the language model.

Flamingo's wiring (Alayrac et al. 2022, arXiv 2204.14198, section 3.2). Legend: M media items, S features an item, R
rows, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.layout import MediaLayout, MediaSize, Piece, Slot
from vlm_train.errors import BatchError, ConfigError
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.layers.passes import decode_stream, generate_from


class PlaceOnly:
    """The layout of images that take no place in the text: only where they stand is known."""

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [[Slot(item, 0)] for item in range(len(sizes))]


class CrossAttentionVLM(PrefixVLM):
    """vision -> connector -> blocks between the layers of the llm.

    Args:
        vision, connector, llm: as of `PrefixVLM`. The connector gives every view the same number of tokens.
        every: a block stands before every so many layers.
        heads: of a block, a divisor of the language model's width.

    Raises:
        ConfigError: `heads` does not divide the width.
    """

    def __init__(self, *, vision: Any, connector: Any, llm: Any, every: int = 4, heads: int = 8) -> None:
        super().__init__(vision=vision, connector=connector, llm=llm)
        if llm.dim % heads:
            raise ConfigError(f"model.heads: got {heads}; allowed: a divisor of the width {llm.dim}")
        self.blocks = llm.insert(lambda: GatedCrossAttention(llm.dim, heads), every=every)

    def media_layout(self, images: Mapping[str, Any]) -> MediaLayout:
        """No placeholders."""
        return PlaceOnly()

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]`."""
        text = batch.text[stream]
        states = self.cross_states(batch, stream)
        return decode_stream(self.llm, self.llm.embed(text.ids), text, cross_states=states)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]`."""
        text, states = batch.text[stream], self.cross_states(batch, stream)
        ask = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, **sampling}
        return generate_from(self.llm, self.llm.embed(text.ids), text, cross_states=states, **ask)

    def cross_states(self, batch: Batch, stream: str) -> CrossStates:
        """What the blocks read: one view an item. Raises `BatchError` for an item of several."""
        if several := [count for count in batch.media.inputs["vision"].view_counts if count != 1]:
            raise BatchError(f"model: a media item has {several[0]} views; allowed: 1 (no video, no tiles)")
        media_of_token = batch.text[stream].media_of_token
        if media_of_token is None:
            raise BatchError("model: the batch does not say which image a token sees; collate makes batches that do")
        return CrossStates(features=self.features(batch).rectangular(), media_of_token=media_of_token)


class GatedCrossAttention(nn.Module):
    """`hidden + tanh(gate) * attention(hidden, features)`. The gate starts at 0: the model begins as its own llm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, cross_states: CrossStates) -> Tensor:
        """`[R, Q, D]` -> `[R, Q, D]`; a query sees the last image before it, or none."""
        features = cross_states.features.to(hidden.dtype).flatten(0, 1).expand(len(hidden), -1, -1)  # [R, M * S, D]
        query, key, value = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.query(self.norm(hidden)), self.key(features), self.value(features))
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=cross_states.attention_mask(hidden))
        found = self.out(found.transpose(1, 2).flatten(2)) * cross_states.sees_media(hidden)
        return hidden + torch.tanh(self.gate) * found
