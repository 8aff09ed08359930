"""The sigmoid loss over the global batch (SigLIP, arXiv 2303.15343): every pair is matched or not, by itself.

Legend: b local pairs, G pairs on all ranks, E width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import EmbedsImagesAndTexts, ScalesSimilarity
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.objectives.pairs import pairs_of


class Sigmoid(Objective):
    """-log sigmoid(z (scale x similarity + bias)) of every image with every text; z is 1 for a pair and -1 otherwise.

    Summed over the texts, averaged over the images: divided by G, not G^2. Only texts travel between ranks.

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
        """`{"sigmoid": Loss}`: sum over the local images of the losses with all texts.

        Raises:
            ConfigError: the model has no bias.
        """
        if model.logit_bias is None:
            raise ConfigError("objective.sigmoid: its logits have a learned bias: set model.init_bias (SigLIP: -10)")
        gather = context.gather
        pairs = pairs_of(batch, gather, self.text)
        count = len(pairs.own)
        image = model.encode_image(batch.media)[:count]
        text = model.encode_text(pairs.stream)[batch.media.row]
        all_text = gather(text, pairs.sizes, with_grad=True)
        scale = model.logit_scale.exp()
        logits = scale * image @ all_text.T + model.logit_bias  # [b, G]
        sign = -torch.ones_like(logits).scatter(1, pairs.own[:, None], -1.0)  # 1 at the own text, -1 elsewhere
        losses = F.softplus(-sign * logits)
        if self.mask_duplicates:
            losses = losses.masked_fill(pairs.same_captions(gather), 0.0)
        loss, each = losses.sum(), losses.detach().sum(dim=1)
        metrics = {
            "image_to_text": pairs.count_hits(logits) / max(count, 1),
            "logit_scale": scale.detach(),
            "logit_bias": model.logit_bias.detach(),
        }
        return {"sigmoid": Loss(loss, loss.new_tensor(float(count)), self.weight, metrics, pairs.by_source(each))}
