"""Image-text matching (ALBEF, BLIP, BLIP-2): does a text belong to an image, told from hard negatives?

Legend: b local pairs, G pairs on all ranks, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import AlignsPairs, MatchesPairs
from vlm_train.contracts.objective import Gather, Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.objectives.itc import compute_similarities
from vlm_train.objectives.pairs import Pairs, pairs_of
from vlm_train.seeds import derive_seed

_MIX = 6364136223846793005
"""An odd multiplier; products wrap around."""


class ITM(Objective):
    """Two-way cross entropy of every pair, of its image with a wrong text, and of its text with a wrong image.

    Wrong ones are drawn from the global batch in proportion to the softmax of the similarities that ITC learns; the
    draw depends on the step and the pair, not on how the batch is split over ranks.

    Args:
        weight: factor in the total loss.
        mask_duplicates: pairs with the same caption are not negatives of each other.
        local: draw from this rank's pairs only (BLIP).
        floor: what is added to every share of the softmax before a wrong one is drawn, so that none is too unlikely
            (BLIP: 1e-4). The softmax is over all pairs that may be drawn from and the own one.
    """

    streams = ("llm",)
    normalized_by = "samples"
    needs_whole_step = True
    needs = (AlignsPairs, MatchesPairs)

    def __init__(
        self, *, weight: float = 1.0, mask_duplicates: bool = False, local: bool = False, floor: float = 0.0
    ) -> None:
        if floor < 0:
            raise ConfigError(f"objective.itm.floor: {floor}; allowed: 0 or more")
        self.weight, self.mask_duplicates, self.local, self.floor = weight, mask_duplicates, local, floor

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{"itm": Loss}`: sum over the local pairs of the mean over their three questions."""
        gather = context.gather
        pairs = pairs_of(batch, gather)
        vectors = model.image_vectors(batch).detach(), model.text_vectors(batch).detach()
        scale = 1 / model.temperature.detach()
        similarity = [scale * one for one in compute_similarities(*vectors, pairs, gather, with_grad=False)]
        negative_text, negative_image, usable = self._draw_negatives(similarity, batch, pairs, gather)
        ids, token_mask = _pad_texts(batch, gather)
        all_ids, all_masks = (gather(one, pairs.sizes, with_grad=False) for one in (ids, token_mask))
        states = model.image_keys_values(batch)
        other = self._other_context(model, batch, states, negative_image, pairs, gather)
        both = tuple(torch.cat([own, own, far]) for own, far in zip(states, other, strict=True))
        asked = (
            torch.cat([ids, all_ids[negative_text], ids]),
            torch.cat([token_mask, all_masks[negative_text], token_mask]),
        )
        logits = model.match(both, *asked).float()  # [3b, 2]
        count = len(ids)
        target = torch.cat([pairs.own.new_ones(count), pairs.own.new_zeros(2 * count)])
        counted = torch.cat([torch.ones_like(usable), usable, usable]).float()
        losses = (F.cross_entropy(logits, target, reduction="none") * counted).view(3, count)
        each = losses.sum(dim=0) / counted.view(3, count).sum(dim=0)
        hits = ((logits.detach().argmax(dim=1) == target) * counted).sum() / counted.sum().clamp(min=1)
        sources = pairs.by_source(each.detach())
        total = each.sum() + 0.0 * logits.sum()
        return {"itm": Loss(total, each.new_tensor(float(count)), self.weight, {"accuracy": hits}, sources)}

    def _draw_negatives(
        self, similarity: Sequence[Tensor], batch: Batch, pairs: Pairs, gather: Gather
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The global numbers `[b]` of a wrong text for every local image and of a wrong image for every local text, and
        whether there are any; `similarity` holds the logits `[b, G]` of both directions."""
        column = torch.arange(sum(pairs.sizes), device=pairs.own.device)
        closed = column[None] == pairs.own[:, None]
        if self.mask_duplicates:
            closed = closed | pairs.same_captions(gather)
        if self.local:
            first = sum(pairs.sizes[: gather.rank])
            far = ((column < first) | (column >= first + len(pairs.own)))[None]
            closed, similarity = closed | far, [one.masked_fill(far, float("-inf")) for one in similarity]
        if self.floor:
            similarity = [(one.softmax(dim=1) + self.floor).log() for one in similarity]
        drawn = [
            (one + noise).masked_fill(closed, float("-inf")).argmax(dim=1) if len(column) else pairs.own
            for one, noise in zip(similarity, self._draw_noise(batch, pairs, gather), strict=True)
        ]
        return drawn[0], drawn[1], ~closed.all(dim=1)

    def _draw_noise(self, batch: Batch, pairs: Pairs, gather: Gather) -> tuple[Tensor, Tensor]:
        """Gumbel noise `[b, G]` for both directions, with which the largest logit is a draw from their softmax; it is a
        function of the step and the two samples, on whichever rank and in whichever place they are."""
        step = batch.window.step if batch.window is not None else 0
        ids = [derive_seed("pair", key) for key in batch.media.keys]
        mine = torch.tensor(ids, dtype=torch.int64, device=pairs.own.device)
        everyone = gather(mine, pairs.sizes, with_grad=False)
        first, second = (
            gumbel_noise(mine, everyone, derive_seed("itm", step, direction)) for direction in ("text", "image")
        )
        return first, second

    def _other_context(
        self, model: Any, batch: Batch, own: tuple[Tensor, ...], wrong: Tensor, pairs: Pairs, gather: Gather
    ) -> tuple[Tensor, ...]:
        """What cross-attention reads of the wrong images; where they are this rank's it is known already."""
        if self.local or len(pairs.sizes) == 1:
            here = (wrong - pairs.own[:1]).clamp(min=0)  # a pair alone on its rank drew number 0, and does not count
            return tuple(one[here] for one in own)
        features = model.features(batch)
        everything = gather(features, pairs.sizes, with_grad=features.requires_grad)
        return model.context(everything[wrong])


def gumbel_noise(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """Gumbel noise `[b, G]`, each number a function of its row's and column's name (int64) and the seed."""
    mixed = (rows[:, None] ^ seed) * _MIX + columns[None, :]
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 31)) * _MIX
    uniform = ((mixed >> 11) & (2**40 - 1)).double().add(0.5) / 2**40
    return -torch.log(-torch.log(uniform)).float()


def _pad_texts(batch: Batch, gather: Gather) -> tuple[Tensor, Tensor]:
    """Ids `[b, T]` and real tokens `[b, T]` of the local texts, T the longest of all ranks."""
    stream = batch.text["llm"]
    rows = batch.media.row
    longest = max(gather.sizes(stream.ids.shape[1]))
    ids, token_mask = stream.ids[rows], (stream.segment_ids != 0)[rows]
    return tuple(F.pad(one, (0, longest - one.shape[1])) for one in (ids, token_mask))  # type: ignore[return-value]
