"""The sigmoid loss over the global batch (SigLIP, arXiv 2303.15343): every pair is matched or not, by itself.

Legend: b local pairs, G pairs on all ranks, E width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from vlm_train.data.batch import Batch
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import Gather, Loss
from vlm_train.objectives.contrastive import duplicates, pairs_by_source, pairs_of


class Sigmoid:
    """-log sigmoid(z (scale x similarity + bias)) of every image with every text; z is 1 for a pair and -1 otherwise.

    Summed over the texts, averaged over the images: divided by G, not G^2. Only texts travel between ranks.

    Args:
        weight: factor in the total loss.
        stream: the entry of `Window.sums` that normalises: pairs are samples.
        text: the token stream of the captions, one a row.
        mask_duplicates: pairs with the same caption are not negatives of each other.
    """

    def __init__(
        self, *, weight: float = 1.0, stream: str = "samples", text: str = "llm", mask_duplicates: bool = False
    ) -> None:
        self.weight = weight
        self.stream = stream
        self.text = text
        self.mask_duplicates = mask_duplicates

    def __call__(self, model: Any, batch: Batch, gather: Gather) -> dict[str, Loss]:
        """`{"sigmoid": Loss}`: sum over the local images of the losses with all texts.

        Raises:
            ConfigError: the model has no bias.
        """
        if model.logit_bias is None:
            raise ConfigError("objective.sigmoid: its logits have a learned bias: set model.init_bias (SigLIP: -10)")
        stream, pairs = batch.text[self.text], pairs_of(batch, self.text)
        image = model.encode_image(batch.media)[:pairs]
        text = model.encode_text(stream)[batch.media.row]
        sizes = gather.sizes(pairs)
        all_text = gather(text, sizes, with_grad=True)
        target = torch.arange(pairs, device=image.device) + sum(sizes[: gather.rank])
        scale = model.logit_scale.exp()
        logits = scale * image @ all_text.T + model.logit_bias  # [b, G]
        sign = -torch.ones_like(logits).scatter(1, target[:, None], -1.0)  # 1 at the own text, -1 elsewhere
        losses = F.softplus(-sign * logits)
        if self.mask_duplicates:
            losses = losses.masked_fill(duplicates(batch, stream, target, gather, sizes), 0.0)
        loss, each = losses.sum(), losses.detach().sum(dim=1)
        hits = (logits.argmax(dim=1) == target).sum() if pairs else target.sum()
        metrics = {
            "image_to_text": hits / max(pairs, 1),
            "logit_scale": scale.detach(),
            "logit_bias": model.logit_bias.detach(),
        }
        sources = pairs_by_source(batch, stream, each)
        return {"sigmoid": Loss(loss, loss.new_tensor(float(pairs)), self.weight, metrics, sources)}
