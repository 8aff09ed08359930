"""Retrieval for two-tower models: does an image lie nearest to its own caption, and a caption to one of its images?

Legend: N images, C distinct captions, E width of the shared space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.stream import ShardSet
from vlm_train.evaluation.answers import normalised
from vlm_train.evaluation.common import Unusable
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

    def __init__(self, *, shards: str, limit: int | None = None, batch: int = 256, at_validation: bool = True) -> None:
        self.shards, self.limit, self.batch, self.at_validation = shards, limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> dict[str, Any]:
        """Returns `accuracy` (R@1 of captions) in [0, 1], `n` images, `results`: rows `{name, value, n, note}` if
        `final`.

        Raises:
            ConfigError: the model has no two towers, or no sample can be used.
        """
        del folder
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable = Unusable(shards, self.reported)
        images, captions = image_vectors(model, processor, shards, count, self.batch, unusable)
        names: dict[str, str] = {}
        for caption in captions:
            names.setdefault(normalised(caption), caption)
        numbers = {name: number for number, name in enumerate(names)}
        own = [numbers[normalised(caption)] for caption in captions]
        scores = images @ text_vectors(model, processor, list(names.values()), self.batch).T  # [N, E] x [E, C]
        rows = recalls(scores, own)
        rows[0]["note"] += unusable.note
        return {"accuracy": rows[0]["value"], "n": len(own), "results": rows if final else []}


def recalls(scores: Tensor, own: Sequence[int]) -> list[dict[str, Any]]:
    """Rows `{name, value, n, note}`: R@1, R@5 of captions, then of images.

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
        rows.append(_row(f"caption retrieval R@{depth}", found, f"{note} (chance {chance:.3f})"))
    for depth in DEPTHS:
        nearest = scores.T.topk(min(depth, images), dim=1).indices
        found = bears[nearest] == torch.arange(captions, device=scores.device)[:, None]
        chance = image_chance(list(Counter(own).values()), depth)
        note = f"one of a caption's images is among the nearest {depth} of {images} (chance {chance:.3f})"
        rows.append(_row(f"image retrieval R@{depth}", found, note))
    return rows


def image_chance(bearers: Sequence[int], depth: int) -> float:
    """Expected R@`depth` of captions whose nearest images are random; `bearers`: how many images bear each caption."""
    images = sum(bearers)
    misses = [comb(images - one, min(depth, images)) / comb(images, min(depth, images)) for one in bearers]
    return 1 - sum(misses) / len(misses)


def _row(name: str, found: Tensor, note: str) -> dict[str, Any]:
    hits = found.any(dim=1)
    return {"name": name, "value": hits.double().mean().item(), "n": len(hits), "note": note}
