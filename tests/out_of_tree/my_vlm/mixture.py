"""A family with several vision encoders, weighed image by image by a router, and the loss that keeps it balanced.

`vision`, `connector` and `image` map the same names to an encoder, its connector and its image plan. Legend: N views, E
encoders, V images of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family, Outputs, PredictsTokens
from vlm_train.contracts.layout import MediaLayout, MediaSize, Piece, Slot
from vlm_train.contracts.media import Features, Grid3
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.data.images.plan import ImagePlan
from vlm_train.errors import BatchError
from vlm_train.models.layers.merge import merge_features
from vlm_train.models.layers.passes import decode_stream, generate_from, outputs_of

ROUTER_LOGITS = "router_logits"
"""The auxiliary output that `Balance` reads."""


@dataclass(frozen=True)
class JoinedTokens:
    """The layout: the tokens of all encoders, one encoder after the other in every view."""

    images: Mapping[str, ImagePlan]
    token_grids: Mapping[str, Any]

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        counts = [
            sum(self.token_grids[name](grid).size for name, plan in self.images.items() for grid in plan.grids(size))
            for size in sizes
        ]
        return [[Slot(item, count)] for item, count in enumerate(counts)]


class Mixture(Family):
    """vision: {name: encoder} -> connector: {name: connector} -> tokens times the router's share -> llm.

    Args:
        vision: encoders by name.
        connector: connectors to the width of the language model, by the same names.
        llm: a `LanguageModel`.
    """

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        super().__init__()
        self.vision, self.connector, self.llm = vision, connector, llm
        self.router = nn.Linear(sum(encoder.out_dim for encoder in vision.values()), len(vision))

    def media_layout(self, images: Mapping[str, ImagePlan]) -> MediaLayout:
        """As many placeholders as all connectors make tokens."""
        return JoinedTokens(dict(images), {name: one.token_grid for name, one in self.connector.items()})

    def forward(self, batch: Batch, stream: str = "llm") -> Outputs:
        """Final hidden states `[B, T, D]`, and the router's logits `[V, E]` of the views of images."""
        embeds, logits = self.embed(batch, stream)
        return Outputs(decode_stream(self.llm, embeds, batch.text[stream]), {ROUTER_LOGITS: logits})

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.llm.head(hidden)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]`."""
        ask = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, **sampling}
        return generate_from(self.llm, self.embed(batch, stream)[0], batch.text[stream], **ask)

    def embed(self, batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
        """`[B, T, D]`, the stream's tokens with the images' in place, and the router's logits.

        Raises:
            BatchError: image plans cut an item into different numbers of views, or the text expects other tokens.
        """
        media, text = batch.media, batch.text[stream]
        view_counts, *others = {one.view_counts for one in media.inputs.values()}
        if others:
            raise BatchError(f"image: the plans of {', '.join(media.inputs)} cut an image into different views")
        features, logits = self.mix(media.inputs)
        embeds = merge_features(self.llm.embed(text.ids), features, view_counts, text.slots, media)
        # Without images the slice is empty, but the blank view stays in the graph: every rank runs every part.
        return embeds, logits[: sum(view_counts)]

    def mix(self, inputs: Mapping[str, Any]) -> tuple[Features, Tensor]:
        """The tokens of all encoders, view by view, and the router's logits `[N, E]`."""
        seen = {name: encoder.encode(inputs[name]) for name, encoder in self.vision.items()}
        logits = self.router(torch.cat([one.mean() for one in seen.values()], dim=-1))
        shares = len(seen) * logits.softmax(dim=-1)  # 1 where all weigh the same
        tokens = [self.connector[name](one) for name, one in seen.items()]
        views = list(zip(*(one.values.split(one.lengths) for one in tokens), strict=True))
        weighed = [share * values for view, row in zip(views, shares, strict=True)
                   for values, share in zip(view, row, strict=True)]  # fmt: skip
        grids = tuple(Grid3(1, 1, sum(map(len, view))) for view in views)
        return Features(torch.cat(weighed), grids), logits


class Balance(Objective):
    """E times the sum of the encoders' squared shares, for every image: 1 where all weigh the same, E where one takes
    it all.

    Args:
        weight: factor in the total loss.
    """

    streams = ("llm",)
    normalized_by = "samples"
    needs = (PredictsTokens,)

    def __init__(self, *, weight: float = 0.01) -> None:
        self.weight = weight

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{balance: Loss}`."""
        logits = outputs_of(model, batch, "llm").aux[ROUTER_LOGITS].float()
        shares = logits.softmax(dim=-1)
        total = logits.shape[1] * shares.square().sum()
        return {"balance": Loss(total, total.new_tensor(float(sum(map(len, batch.keys)))), self.weight)}
