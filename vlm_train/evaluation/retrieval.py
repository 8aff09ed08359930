"""Caption retrieval for two-tower models: does an image lie nearest to its own caption?

Legend: N images, C distinct captions, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.stream import ShardSet
from vlm_train.data.render import Rendered, render
from vlm_train.errors import ConfigError
from vlm_train.evaluation.answers import normalised, reference
from vlm_train.evaluation.common import Unusable, evaluating, progress_bar, views_of

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_train.build import Built

    _Item = tuple[str, Rendered, list[np.ndarray]]


class CaptionRetrieval:
    """Share of images whose own caption is the nearest of all distinct captions in the set.

    Args:
        shards: shard set of captioned images; the first annotation of a sample is its caption.
        limit: first samples only.
        batch: images a call of the model.
        at_validation: also run at every validation.
    """

    def __init__(self, *, shards: str, limit: int | None = None, batch: int = 256, at_validation: bool = True) -> None:
        self.shards, self.limit, self.batch, self.at_validation = shards, limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, built: Built, folder: Path, *, final: bool) -> dict[str, Any]:
        """Returns `accuracy` in [0, 1], `n` images, `results`: a row `{name, value, n, note}` if `final`.

        Raises:
            ConfigError: the model has no two towers.
        """
        import torch

        del folder
        if not hasattr(built.model, "encode_image") or not hasattr(built.model, "encode_text"):
            raise ConfigError(f"eval: caption retrieval needs model=two_tower, got {type(built.model).__name__}")
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable = Unusable(shards, self.reported)
        captions: dict[str, Any] = {}
        own, images = [], []
        with evaluating(built.model):
            progress = progress_bar("images", count)
            for start in range(0, count, self.batch):
                numbers = range(start, min(start + self.batch, count))
                if items := self._items(built, shards, numbers, unusable):
                    texts, image, text = self._encode(built, items)
                    for caption, vector in zip(texts, text, strict=True):
                        captions.setdefault(caption, vector)
                    own += texts
                    images.append(image)
                progress(len(numbers))
            unusable.check(count)
            names = list(captions)
            if not names:
                raise ConfigError(f"eval: {self.shards} holds no captions")
            nearest = (
                (torch.cat(images) @ torch.stack(list(captions.values())).T).argmax(dim=1).tolist()
            )  # [N, E] x [E, C]
        value = sum(names[found] == caption for found, caption in zip(nearest, own, strict=True)) / len(own)
        note = f"own caption is the nearest of {len(names)} (chance {1 / len(names):.3f}){unusable.note}"
        row = {"name": "caption retrieval", "value": value, "n": len(own), "note": note}
        return {"accuracy": value, "n": len(own), "results": [row] if final else []}

    def _items(self, built: Built, shards: ShardSet, numbers: Iterable[int], unusable: Unusable) -> list[_Item]:
        """Caption, rendered caption and views of the numbered samples that can be used."""
        items = []
        for number in numbers:
            with unusable.watch(number):
                sample, blobs = shards.load(number)
                caption = normalised(reference(sample.annotations[0]))
                rendered = render(sample, built.template, built.tokenizer, built.layout, annotations="first")
                items.append((caption, rendered, views_of(built, blobs[:1])))
        return items

    def _encode(self, built: Built, items: Sequence[_Item]) -> tuple[list[str], Tensor, Tensor]:
        """Captions, image vectors `[N, E]` and caption vectors `[N, E]`."""
        from vlm_train.data.collate import collate_prompts

        batch = collate_prompts([(rendered, views) for _, rendered, views in items], built.image_size)
        batch = batch.to(next(built.model.parameters()).device)
        if batch.media.real != len(items):
            raise ConfigError(f"eval: caption retrieval needs one image a sample, but {self.shards} has some without")
        model: Any = built.model
        return (
            [caption for caption, _, _ in items],
            model.encode_image(batch.media),
            model.encode_text(batch.text["llm"]),
        )
