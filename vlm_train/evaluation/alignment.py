"""Retrieval and matching for models that align images and texts (Q-Former stage 1, BLIP) on held-out captions.

Legend: N images, C distinct captions, Q vectors an image, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.evaluator import Findings, ResultRow
from vlm_train.contracts.family import AlignsPairs, MatchesPairs
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.evaluation.generate import reference_answer
from vlm_train.evaluation.metrics.texts import normalize_text
from vlm_train.seeds import derive_seed


class Alignment:
    """Is an image nearest to its own caption (R@1 over the distinct captions), and does the matching head tell its own
    caption from another one?

    Args:
        shards: shard set of captioned images; the first annotation of a sample is its caption.
        limit: first samples only.
        batch: images a call of the model.
        at_validation: also run at every validation.
    """

    needs = (AlignsPairs, MatchesPairs)
    primary = "caption_recall_at_1"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"caption_recall_at_1": True, "matching_accuracy": True}

    def __init__(self, *, shards: str, limit: int | None = None, batch: int = 64, at_validation: bool = True) -> None:
        self.shards, self.limit, self.batch, self.at_validation = shards, limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Encode all images and captions, rank and match them. Raises ConfigError for fewer than two captions."""
        del folder
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable = Unusable(shards, self.reported)
        own: list[str] = []
        images, texts, matched = [], dict[str, Tensor](), []
        aligner, device = cast(Any, model), next(model.parameters()).device
        with evaluation_mode(model):
            progress = progress_bar("images", count)
            for start in range(0, count, self.batch):
                numbers = range(start, min(start + self.batch, count))
                captions, batch = self._collate_pairs(processor, shards, numbers, unusable)
                if captions:
                    batch = batch.to(device)
                    images.append(aligner.image_vectors(batch))
                    for caption, vector in zip(captions, aligner.text_vectors(batch), strict=True):
                        texts.setdefault(caption, vector)
                    matched.append(_count_matched(model, batch, captions, start))
                    own += captions
                progress(len(numbers))
            unusable.require_usable(count)
            if len(texts) < 2:
                raise ConfigError(f"eval: {self.shards} holds {len(texts)} different captions; alignment needs two")
            found = _nearest_texts(torch.cat(images), torch.stack(list(texts.values())))
        names = list(texts)
        recall = sum(names[one] == caption for one, caption in zip(found, own, strict=True)) / len(own)
        right, asked = (sum(one) for one in zip(*matched, strict=True))
        told_apart = right / max(asked, 1)
        chance = f"own caption is the nearest of {len(names)} (chance {1 / len(names):.3f}){unusable.note}"
        apart = "own and other captions told apart (chance 0.5)"
        rows = (
            ResultRow("caption retrieval", recall, len(own), chance, "caption_recall_at_1"),
            ResultRow("matching", told_apart, int(asked), apart, "matching_accuracy"),
        )
        metrics = {row.metric: row.value for row in rows}
        return Findings(metrics, self.primary, self.higher_is_better, rows if final else ())

    def _collate_pairs(
        self, processor: Processor, shards: ShardSet, numbers: Iterable[int], unusable: Unusable
    ) -> tuple[list[str], Batch]:
        """Captions, and the batch, of the numbered samples that can be used."""
        captions, items = list[str](), list[Sequence[Example]]()
        options = RenderOptions(annotations="first", max_length=processor.max_length, over_length="truncate")
        for number in numbers:
            with unusable.catch_bad_sample(number):
                sample, blobs = shards.load_sample(number)
                rendered = processor.render(sample, options)
                items.append([Example(rendered, processor.make_views(blobs[:1], media=sample.media[:1]))])
                captions.append(normalize_text(reference_answer(sample.annotations[0])))
        return captions, collate_rows(items, processor.images)


def _nearest_texts(images: Tensor, texts: Tensor) -> list[int]:
    """The nearest text `[C, E]` of every image `[N, Q, E]`."""
    found: list[int] = torch.einsum("nqe,ce->ncq", images, texts).amax(dim=-1).argmax(dim=1).tolist()
    return found


def _count_matched(model: Any, batch: Batch, captions: Sequence[str], seed: int) -> tuple[float, float]:
    """How many of (image, own caption) and (image, another caption of the batch) are told apart, and how many were
    asked."""
    draw = np.random.default_rng(derive_seed("matching", seed))
    others = [[j for j, other in enumerate(captions) if other != caption] for caption in captions]
    rows = [row for row, other in enumerate(others) if other]
    if not rows:
        return 0.0, 0.0
    wrong = [int(draw.choice(others[row])) for row in rows]
    stream = batch.text["llm"]
    real = stream.segment_ids != 0
    context = tuple(states[rows] for states in model.image_keys_values(batch))
    right = 0.0
    for texts, label in ((rows, 1), (wrong, 0)):
        right += float((model.match(context, stream.ids[texts], real[texts]).argmax(dim=1) == label).sum())
    return right, 2.0 * len(rows)
