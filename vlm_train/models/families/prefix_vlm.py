"""Prefix models (LLaVA type): image tokens take the place of placeholders in the prompt of a causal language model.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family
from vlm_train.contracts.media import Features
from vlm_train.models.families.text_only import decode_stream, generate_from
from vlm_train.models.layers.merge import check_slots, merge_features


class PrefixVLM(Family):
    """vision -> connector -> merge -> llm.

    Args:
        vision: a `VisionEncoder`.
        connector: a `Connector` to width D.
        llm: a `LanguageModel` of width D.
    """

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.llm = llm

    def features(self, batch: Batch) -> Features:
        """Features of width D of every view, the blank one of a batch without images included: always one tower
        call."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision)):
            patches = self.vision.encode(batch.media.inputs["vision"])
        trains = patches.values.requires_grad or _is_trained(self.connector)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            dtype = _dtype_of(self.connector, patches.values.dtype)
            return self.connect(patches.map(lambda values: values.to(dtype)), batch)

    def connect(self, patches: Features, batch: Batch) -> Features:
        """Width D_v -> D. A family whose connector reads more than patches finds it in the batch."""
        return self.connector(patches)

    def embed(self, batch: Batch, stream: str = "llm") -> Tensor:
        """`[B, T, D]`: the stream's tokens, with the image features at their placeholders.

        Raises:
            BatchError: a media item has another number of features than placeholders, or a placeholder gets none.
        """
        media, text = batch.media, batch.text[stream]
        embeds = self.llm.embed(text.ids)
        features, shown = self.features(batch), media.inputs["vision"]
        check_slots(features.count_by_item(shown.view_counts), media.slot_counts, media.keys)
        # Without images this merges an empty slice: the blank view stays in the graph, with gradients of zero, so that
        # every rank makes the same collective calls in backward.
        return merge_features(embeds, features.first(shown.real).values, text.slots, media.slot_counts)

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]`."""
        return decode_stream(self.llm, self.embed(batch, stream), batch.text[stream])

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.llm.head(hidden)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]` to the prompts in `batch` (one segment a row, padded on either side)."""
        embeds = self.embed(batch, stream)
        return generate_from(
            self.llm, embeds, batch.text[stream], max_new_tokens=max_new_tokens, eos_ids=eos_ids, **sampling
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), default)
