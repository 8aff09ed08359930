"""A family with several vision encoders, written as a user of the package would: it joins their tokens view by view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.out_of_tree.my_vlm.mixture import JoinedTokens
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family
from vlm_train.contracts.layout import MediaLayout
from vlm_train.contracts.media import Features, Grid3
from vlm_train.data.images.plan import ImagePlan
from vlm_train.models.layers.merge import merge_features
from vlm_train.models.layers.passes import decode_stream


class TokenMixture(Family):
    """vision: {name: encoder}, connector: {name: connector} -> joined tokens -> llm."""

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        super().__init__()
        self.vision, self.connector, self.llm = vision, connector, llm

    def media_layout(self, images: Mapping[str, ImagePlan]) -> MediaLayout:
        return JoinedTokens(dict(images), {name: one.token_grid for name, one in self.connector.items()})

    def features(self, batch: Batch) -> Features:
        found = [
            self.connector[name](encoder.encode(batch.media.inputs[name])).rectangular()
            for name, encoder in self.vision.items()
        ]
        joined = torch.cat(found, dim=1)
        return Features.from_rectangular(joined, Grid3(1, 1, joined.shape[1]))

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        media, text = batch.media, batch.text[stream]
        features, shown = self.features(batch), next(iter(media.inputs.values()))
        embeds = merge_features(self.llm.embed(text.ids), features, shown.view_counts, text.slots, media)
        return decode_stream(self.llm, embeds, text)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.llm.head(hidden)
