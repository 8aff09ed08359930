"""Symmetric InfoNCE over the global batch (CLIP, arXiv 2103.00020, figure 3).

Legend: b local pairs, G pairs on all ranks, T tokens, E width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import EmbedsImagesAndTexts, ScalesSimilarity
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.objectives.pairs import pairs_of


class Contrastive(Objective):
    """Every image against every text of the global batch, and the reverse.

    Every rank returns the sum over its own pairs, which may be none: the total over all ranks, divided by the number of
    pairs, is the loss of the global batch, however the batch is split.

    Args:
        weight: factor in the total loss.
        text: the token stream of the captions, one a row.
        mask_duplicates: pairs with the same caption are not negatives of each other.
    """

    normalized_by = "samples"
    needs_whole_step = True
    needs = (EmbedsImagesAndTexts, ScalesSimilarity)

    def __init__(self, *, weight: float = 1.0, text: str = "llm", mask_duplicates: bool = False) -> None:
        self.weight = weight
        self.text = text
        self.streams = (text,)
        self.mask_duplicates = mask_duplicates

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{"contrastive": Loss}`: sum over the local pairs of the mean of both directions."""
        gather = context.gather
        pairs = pairs_of(batch, gather, self.text)
        count = len(pairs.own)
        image = model.encode_image(batch.media)[:count]
        text = model.encode_text(pairs.stream)[batch.media.row]
        all_image, all_text = (gather(one, pairs.sizes, with_grad=True) for one in (image, text))
        scale = model.logit_scale.exp()
        both = [scale * image @ all_text.T, scale * text @ all_image.T]  # [b, G] each
        if self.mask_duplicates:
            same = pairs.same_captions(gather)
            both = [logits.masked_fill(same, float("-inf")) for logits in both]
        losses = torch.stack([F.cross_entropy(logits, pairs.own, reduction="none") for logits in both])
        loss, each = losses.sum(dim=1).mean(), losses.detach().mean(dim=0)
        metrics = {
            "image_to_text": pairs.count_hits(both[0]) / max(count, 1),
            "text_to_image": pairs.count_hits(both[1]) / max(count, 1),
            "logit_scale": scale.detach(),
        }
        return {"contrastive": Loss(loss, loss.new_tensor(float(count)), self.weight, metrics, pairs.by_source(each))}
