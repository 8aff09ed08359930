"""A language model alone, for text-only stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family
from vlm_train.models.layers.passes import decode_stream, generate_from


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
