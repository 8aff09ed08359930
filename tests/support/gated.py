"""A family of Flamingo's kind: gated cross-attention inserted into a language model, its images outside the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.layout import MediaSize, Piece, Slot
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.layers.passes import decode_stream, generate_from


class GatedCrossAttention(nn.Module):
    """`hidden + tanh(gate) * attention(hidden, features)`; a gate of zero, as at the start, is the identity."""

    def __init__(self, dim: int, heads: int = 4, gate: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, hidden: Tensor, cross_states: CrossStates) -> Tensor:
        features = cross_states.features.to(hidden.dtype).flatten(0, 1).expand(len(hidden), -1, -1)
        query = self.query(self.norm(hidden))
        split = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, self.key(features), self.value(features))
        )
        found = nn.functional.scaled_dot_product_attention(*split, attn_mask=cross_states.attention_mask(hidden))
        found = self.out(found.transpose(1, 2).flatten(2)) * cross_states.sees_media(hidden)
        return hidden + torch.tanh(self.gate) * found


class MarkerLayout:
    """An image is a place in the text, marked by `tokens`, if any."""

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self.tokens = tokens

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [[*self.tokens] or [Slot(item, 0)] for item in range(len(sizes))]


class GatedVLM(PrefixVLM):
    """vision -> connector -> blocks between the layers of the llm."""

    def __init__(self, *, vision: Any, connector: Any, llm: Any, every: int = 1, gate: float = 0.0) -> None:
        super().__init__(vision=vision, connector=connector, llm=llm)
        self.blocks = llm.insert(lambda: GatedCrossAttention(llm.dim, gate=gate), every=every)

    def media_layout(self, images: Any) -> MarkerLayout:
        return MarkerLayout()

    def cross_states(self, batch: Batch, stream: str) -> CrossStates:
        media_of_token = batch.text[stream].media_of_token
        assert media_of_token is not None
        return CrossStates(features=self.features(batch).rectangular(), media_of_token=media_of_token)

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        text = batch.text[stream]
        return decode_stream(self.llm, self.llm.embed(text.ids), text, cross_states=self.cross_states(batch, stream))

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        text, states = batch.text[stream], self.cross_states(batch, stream)
        ask = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, **sampling}
        return generate_from(self.llm, self.llm.embed(text.ids), text, cross_states=states, **ask)
