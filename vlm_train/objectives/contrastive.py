"""Symmetric InfoNCE over the global batch (CLIP, arXiv 2103.00020, figure 3).

Legend: b local pairs, G pairs on all ranks, T tokens, E width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.data.batch import Batch, TokenStream
from vlm_train.data.sources import sums_by_source
from vlm_train.errors import BatchError
from vlm_train.objectives.base import Gather, Loss

_HASH_BASE = 6364136223846793005  # an odd 64-bit multiplier; sums wrap around


class Contrastive:
    """Every image against every text of the global batch, and the reverse.

    Every rank returns the sum over its own pairs, which may be none: the total over all ranks, divided by the number of
    pairs, is the loss of the global batch, however the batch is split.

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
        """`{"contrastive": Loss}`: sum over the local pairs of the mean of both directions."""
        stream, pairs = batch.text[self.text], pairs_of(batch, self.text)
        image = model.encode_image(batch.media)[:pairs]
        text = model.encode_text(stream)[batch.media.row]
        sizes = gather.sizes(pairs)
        all_image, all_text = gather(image, sizes, with_grad=True), gather(text, sizes, with_grad=True)
        target = torch.arange(pairs, device=image.device) + sum(sizes[: gather.rank])
        scale = model.logit_scale.exp()
        duplicate = duplicates(batch, stream, target, gather, sizes) if self.mask_duplicates else None
        to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T  # [b, G]
        if duplicate is not None:
            to_text, to_image = (logits.masked_fill(duplicate, float("-inf")) for logits in (to_text, to_image))
        losses = torch.stack([F.cross_entropy(logits, target, reduction="none") for logits in (to_text, to_image)])
        loss, each = losses.sum(dim=1).mean(), losses.detach().mean(dim=0)
        hits = [(logits.argmax(dim=1) == target).sum() if pairs else target.sum() for logits in (to_text, to_image)]
        metrics = {
            "image_to_text": hits[0] / max(pairs, 1),
            "text_to_image": hits[1] / max(pairs, 1),
            "logit_scale": scale.detach(),
        }
        sources = pairs_by_source(batch, stream, each)
        return {"contrastive": Loss(loss, loss.new_tensor(float(pairs)), self.weight, metrics, sources)}


def pairs_of(batch: Batch, text: str) -> int:
    """Number of pairs b. Raises `BatchError` unless every text of the stream named `text` has one image view."""
    texts, pairs = len(batch.text[text].ids), len(batch.media.row)
    if batch.media.real != pairs or (pairs and pairs != texts):  # without pairs, a row of padding
        raise BatchError(
            f"contrastive: needs one image view a text, got {batch.media.real} views of {pairs} images "
            f"for {texts} texts"
        )
    return pairs


def duplicates(batch: Batch, stream: TokenStream, target: Tensor, gather: Gather, sizes: list[int]) -> Tensor:
    """`[b, G]`, True where a pair other than the own one, number `target` `[b]` of all, has the same caption."""
    mine = caption_hashes(stream)[batch.media.row]
    same = mine[:, None] == gather(mine, sizes, with_grad=False)[None, :]
    return same.scatter(1, target[:, None], False)


def pairs_by_source(batch: Batch, stream: TokenStream, each: Tensor) -> dict[str, Tensor]:
    """The losses `[b]` of the local pairs as `Loss.sources`."""
    first = batch.media.row * stream.ids.shape[1]  # the flat position of every text
    return sums_by_source(batch, stream, first, torch.stack([each, torch.ones_like(each)], dim=1))


def caption_hashes(stream: TokenStream) -> Tensor:
    """`[B]` int64 fingerprint of each row's real tokens; the same for any padding, so it compares across ranks."""
    real = stream.segment_ids != 0
    place = real.long().cumsum(dim=1)
    mixed = (stream.ids + 1) * (2 * place + 1) * _HASH_BASE
    mixed = (mixed ^ (mixed >> 29)) * _HASH_BASE  # so that swapped tokens do not cancel
    return (mixed * real).sum(dim=1)
