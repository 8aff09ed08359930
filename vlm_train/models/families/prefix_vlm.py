"""Prefix models (LLaVA type): image tokens take the place of placeholders in the prompt of a causal language model.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family
from vlm_train.contracts.media import Features, MediaInput
from vlm_train.models.layers.merge import merge_features
from vlm_train.models.layers.passes import cached_on_batch, decode_stream, generate_from, take_from_batch


class PrefixVLM(Family):
    """vision -> connector -> stitcher -> merge -> llm.

    Args:
        vision: a `VisionEncoder`.
        connector: a `Connector` to width D.
        llm: a `LanguageModel` of width D.
        stitcher: a `Stitcher` of width D, for images of several views; None: their tokens stand one after the other.
        feature_projection: maps vision features `[F, D_v]` to the width of a teacher's, for feature distillation; no
            answer depends on it.
    """

    def __init__(
        self, *, vision: Any, connector: Any, llm: Any, stitcher: Any = None, feature_projection: Any = None
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.stitcher = stitcher
        self.llm = llm
        self.feature_projection = feature_projection

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]`: encode, connect and merge (`embed`), then decode."""
        return decode_stream(self.llm, self.embed(batch, stream), batch.text[stream])

    def embed(self, batch: Batch, stream: str = "llm") -> Tensor:
        """`[B, T, D]`: the stream's tokens, with the image features at their placeholders.

        Raises:
            BatchError: a media item has another number of features than placeholders, or a placeholder gets none.
        """
        text, shown = batch.text[stream], batch.media.inputs["vision"]
        embeds, features, counts = self.llm.embed(text.ids), self.features(batch), self.count_views(shown)
        if self.stitcher is not None:
            features, counts = self.stitcher(features, shown), (1,) * len(counts)
        return merge_features(embeds, features, counts, text.slots, batch.media)

    def features(self, batch: Batch) -> Features:
        """Features of width D of every view, the blank one of a batch without images included: always one tower
        call. Frozen parts that nothing trained comes before run without gradients."""
        records = torch.is_grad_enabled()
        patches = take_from_batch(batch, self, "patches", lambda: self._encode_views(batch))
        weights = list(self.connector.parameters())
        trains = patches.values.requires_grad or any(weight.requires_grad for weight in weights)
        with torch.set_grad_enabled(records and trains):
            dtype = weights[0].dtype if weights else patches.values.dtype
            return self.connect(Features(patches.values.to(dtype), patches.grids), batch)

    def encode_patches(self, batch: Batch) -> Features:
        """Features of width D_v of every view, as the vision encoder gives them. They stay with the batch, where
        `features` finds them."""
        return cached_on_batch(batch, self, "patches", lambda: self._encode_views(batch))

    def _encode_views(self, batch: Batch) -> Features:
        """The same, computed: without gradients where the encoder is frozen."""
        learns = any(weight.requires_grad for weight in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return self.vision.encode(batch.media.inputs["vision"])

    def connect(self, patches: Features, batch: Batch) -> Features:
        """Width D_v -> D. A family whose connector reads more than patches finds it in the batch."""
        return self.connector(patches)

    def count_views(self, shown: MediaInput) -> tuple[int, ...]:
        """Views of each media item, as `connect` leaves them."""
        return shown.view_counts

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
