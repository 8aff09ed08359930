"""A language model alone, for text-only stages, and how any family drives its language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, TokenStream
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.family import Family
from vlm_train.contracts.parts import Encoded
from vlm_train.models.layers.masks import attention_of


def decode_stream(llm: Any, embeds: Tensor, stream: TokenStream, **reads: CrossStates | Encoded) -> Tensor:
    """Run `llm` over embeddings `[B, T, D]` with the stream's positions, segments and groups -> `[B, T, D]`.

    `reads` is what else it reads: `cross_states` for inserted blocks, `encoded` for the decoder of an encoder-decoder.
    """
    return llm.decode(embeds, stream.positions, attention_of(stream, llm.takes_packed), **reads)


def generate_from(
    llm: Any, embeds: Tensor, stream: TokenStream, *, cross_states: CrossStates | None = None, **settings: Any
) -> Tensor:
    """Continue the prompts of `stream`: rows of one segment, padded on any side -> `[B, up to max_new_tokens]`."""
    token_mask = stream.segment_ids != 0
    order = token_mask.int().argsort(dim=1, stable=True)  # padding to the left, real tokens in their order
    embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    if cross_states is not None:
        settings["cross_states"] = cross_states.reorder_tokens(order)
    return llm.generate(embeds, token_mask.gather(1, order), **settings)


class TextOnly(Family):
    """The language model without images; batches carry their blank view unread."""

    def __init__(self, *, llm: Any) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]`."""
        return decode_stream(self.llm, self.llm.embed(batch.text[stream].ids), batch.text[stream])

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.llm.head(hidden)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]` to the prompts in `batch`."""
        embeds = self.llm.embed(batch.text[stream].ids)
        return generate_from(
            self.llm, embeds, batch.text[stream], max_new_tokens=max_new_tokens, eos_ids=eos_ids, **sampling
        )
