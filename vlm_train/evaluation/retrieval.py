"""Retrieval for two-tower models: does an image lie nearest to its own caption, and a caption to one of its images?

Legend: N images, C distinct captions, E width of the shared space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.evaluator import Findings, ResultRow
from vlm_train.contracts.family import EmbedsImagesAndTexts
from vlm_train.evaluation.common import Unusable
from vlm_train.evaluation.metrics.texts import normalize_text
from vlm_train.evaluation.towers import image_vectors, text_vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_train.data.processor import Processor

DEPTHS = (1, 5)


class CaptionRetrieval:
    """Recall at 1 and 5 in both directions, over the distinct captions of the set.

    An image finds its own caption among the C; a caption finds one of the images that bear it among the N.

    Args:
        shards: shard set of captioned images; the first annotation of a sample is its caption.
        limit: first samples only.
        batch: images a call of the model.
        at_validation: also run at every validation.
    """

    needs = (EmbedsImagesAndTexts,)
    primary = f"caption_recall_at_{DEPTHS[0]}"
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        f"{kind}_recall_at_{depth}": True for kind in ("caption", "image") for depth in DEPTHS
    }

    def __init__(self, *, shards: str, limit: int | None = None, batch: int = 256, at_validation: bool = True) -> None:
        self.shards, self.limit, self.batch, self.at_validation = shards, limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Encode all images and captions and rank them. Raises ConfigError where no sample can be used."""
        del folder
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable = Unusable(shards, self.reported)
        images, captions = image_vectors(model, processor, shards, count, self.batch, unusable)
        names: dict[str, str] = {}
        for caption in captions:
            names.setdefault(normalize_text(caption), caption)
        numbers = {name: number for number, name in enumerate(names)}
        own = [numbers[normalize_text(caption)] for caption in captions]
        scores = images @ text_vectors(model, processor, list(names.values()), self.batch).T  # [N, E] x [E, C]
        first, *others = recall_rows(scores, own)
        rows = (replace(first, note=first.note + unusable.note), *others)
        found = {row.metric: row.value for row in rows}
        return Findings(found, self.primary, self.higher_is_better, rows if final else ())


def recall_rows(scores: Tensor, own: Sequence[int]) -> list[ResultRow]:
    """R@1, R@5 of captions, then of images.

    Args:
        scores: `[N, C]`, similarity of images and captions.
        own: the caption of every image.
    """
    import torch

    bears = torch.tensor(own, device=scores.device)
    images, captions = scores.shape
    rows = []
    for depth in DEPTHS:
        found = scores.topk(min(depth, captions), dim=1).indices == bears[:, None]
        chance = min(depth, captions) / captions
        note = (
            f"own caption is the nearest of {captions}" if depth == 1 else f"own caption is among the nearest {depth}"
        )
        rows.append(_recall_row("caption", depth, found, f"{note} (chance {chance:.3f})"))
    for depth in DEPTHS:
        nearest = scores.T.topk(min(depth, images), dim=1).indices
        found = bears[nearest] == torch.arange(captions, device=scores.device)[:, None]
        chance = image_chance(list(Counter(own).values()), depth)
        note = f"one of a caption's images is among the nearest {depth} of {images} (chance {chance:.3f})"
        rows.append(_recall_row("image", depth, found, note))
    return rows


def image_chance(bearers: Sequence[int], depth: int) -> float:
    """Expected R@`depth` of captions whose nearest images are random; `bearers`: how many images bear each caption."""
    images = sum(bearers)
    misses = [comb(images - one, min(depth, images)) / comb(images, min(depth, images)) for one in bearers]
    return 1 - sum(misses) / len(misses)


def _recall_row(kind: str, depth: int, found: Tensor, note: str) -> ResultRow:
    hits = found.any(dim=1)
    value = hits.double().mean().item()
    return ResultRow(f"{kind} retrieval R@{depth}", value, len(hits), note, f"{kind}_recall_at_{depth}")
