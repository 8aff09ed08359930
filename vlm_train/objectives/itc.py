"""Image-text contrast (ALBEF, BLIP, BLIP-2): every image against every text of the global batch, and the reverse.

Legend: b local pairs, G pairs on all ranks, Q vectors an image, E width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import AlignsPairs
from vlm_train.contracts.objective import Gather, Loss, Objective, StepContext
from vlm_train.objectives.pairs import Pairs, pairs_of


class ITC(Objective):
    """Cross entropy over similarities; that of an image is the largest over its query vectors.

    Args:
        weight: factor in the total loss.
        label_smoothing: share of the target spread over all pairs (BLIP-2: 0.1).
        gather_grad: whether gradients go to both sides of a comparison. False, as BLIP-2 is published: an image learns
            from its comparison with all texts, a text from its with all images, and what they are compared with,
            gathered from all ranks, is fixed; on one rank, too.
        mask_duplicates: pairs with the same caption are not negatives of each other.
    """

    streams = ("llm",)
    normalized_by = "samples"
    needs_whole_step = True
    needs = (AlignsPairs,)

    def __init__(
        self,
        *,
        weight: float = 1.0,
        label_smoothing: float = 0.1,
        gather_grad: bool = False,
        mask_duplicates: bool = False,
    ) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing
        self.gather_grad, self.mask_duplicates = gather_grad, mask_duplicates

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{"itc": Loss}`: sum over the local pairs of the mean of both directions."""
        gather = context.gather
        image, text = model.image_vectors(batch), model.text_vectors(batch)
        pairs = pairs_of(batch, gather)
        scale = 1 / model.temperature
        to_text, to_image = (scale * one for one in compute_similarities(image, text, pairs, gather, self.gather_grad))
        if self.mask_duplicates:
            same = pairs.same_captions(gather)
            to_text, to_image = (one.masked_fill(same, float("-inf")) for one in (to_text, to_image))
        losses = [smoothed_cross_entropy(logits, pairs.own, self.label_smoothing) for logits in (to_text, to_image)]
        each = (losses[0] + losses[1]) / 2  # [b]
        count = each.new_tensor(float(len(each)))
        hits = [pairs.count_hits(logits.detach()) for logits in (to_text, to_image)]
        metrics = {name: hit / count.clamp(min=1) for name, hit in zip(("r1_text", "r1_image"), hits, strict=True)}
        metrics["temperature"] = 1 / scale.detach()
        sources = pairs.by_source(each.detach())
        return {"itc": Loss(each.sum() + 0.0 * scale, count, self.weight, metrics, sources)}


def compute_similarities(
    image: Tensor, text: Tensor, pairs: Pairs, gather: Gather, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Cosines `[b, G]` of the local images `[b, Q, E]` with all texts, and of the local texts `[b, E]` with all images:
    of several vectors of an image the nearest counts. Without `with_grad` no gradient goes to what is compared with."""
    given = (image, text) if with_grad else (image.detach(), text.detach())
    all_image, all_text = (gather(one, pairs.sizes, with_grad=with_grad) for one in given)
    to_text = torch.einsum("bqe,ge->bgq", image, all_text).amax(dim=-1)
    to_image = torch.einsum("be,gqe->bgq", text, all_image).amax(dim=-1)
    return to_text, to_image


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross entropies `[b]` with a share `smoothing` of the target spread evenly over the columns that are not masked
    (-inf)."""
    log = F.log_softmax(logits, dim=1)
    hit = -log.gather(1, target[:, None])[:, 0]
    if not smoothing:
        return hit
    open_ = logits.detach() > float("-inf")
    even = -log.masked_fill(~open_, 0.0).sum(dim=1) / open_.sum(dim=1)
    return (1 - smoothing) * hit + smoothing * even
