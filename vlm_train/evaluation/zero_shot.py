"""Zero-shot classification with a two-tower model (CLIP, arXiv 2103.00020, section 3.1).

Legend: N images, K classes, P prompts a class, E width of the shared space.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.evaluator import Findings, ResultRow
from vlm_train.contracts.family import EmbedsImagesAndTexts
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable
from vlm_train.evaluation.towers import image_vectors, text_vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_train.data.processor import Processor

PLACE = "{}"


class ZeroShot:
    """Share of images whose class is the nearest; a class is the mean of its prompts' vectors (prompt ensembling).

    The class of an image is the one whose name its caption says. Images whose captions say none or several are left
    out; of names inside one another (dog, hot dog) the longer one counts.

    Args:
        shards: shard set of captioned images; the first annotation of a sample is its caption, or its class.
        classes: names of the K classes.
        templates: texts around a name, which stands for `{}`.
        name: what the result is called.
        limit: first samples only.
        batch: images, or texts, a call of the model.
        at_validation: also run at every validation.
    """

    needs = (EmbedsImagesAndTexts,)
    primary = "accuracy"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True}

    def __init__(
        self,
        *,
        shards: str,
        classes: list[str],
        templates: list[str],
        name: str = "zero-shot",
        limit: int | None = None,
        batch: int = 256,
        at_validation: bool = True,
    ) -> None:
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"eval: {name}.classes: needs two or more different names, got {list(classes)}")
        if not templates or any(template.count(PLACE) != 1 for template in templates):
            raise ConfigError(f"eval: {name}.templates: each needs one {PLACE} for the class, got {list(templates)}")
        self.shards, self.classes, self.templates, self.name = shards, classes, templates, name
        self.limit, self.batch, self.at_validation = limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Find the nearest class of every image. Raises ConfigError where no caption says one of the classes."""
        del folder
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable = Unusable(shards, self.reported)
        images, captions = image_vectors(model, processor, shards, count, self.batch, unusable)
        labels = [class_of(caption, self.classes) for caption in captions]
        kept = [number for number, label in enumerate(labels) if label is not None]
        if not kept:
            raise ConfigError(f"eval: {self.name}: no caption of {self.shards} says one of {', '.join(self.classes)}")
        found = (images[kept] @ self.class_vectors(model, processor).T).argmax(dim=1).tolist()  # [N, E] x [E, K]
        wanted = [labels[number] for number in kept]
        value = sum(self.classes[one] == label for one, label in zip(found, wanted, strict=True)) / len(kept)
        most = Counter(wanted).most_common(1)[0][1] / len(kept)
        left = f", {len(labels) - len(kept):,} left out" if len(kept) < len(labels) else ""
        note = (
            f"nearest of {len(self.classes)} classes, {len(self.templates)} prompts each "
            f"(chance {1 / len(self.classes):.3f}, most frequent class {most:.3f}){left}{unusable.note}"
        )
        rows = (ResultRow(self.name, value, len(kept), note, self.primary),) if final else ()
        return Findings({self.primary: value}, self.primary, self.higher_is_better, rows)

    def class_vectors(self, model: nn.Module, processor: Processor) -> Tensor:
        """Unit vectors `[K, E]` of the classes: the mean over the prompts of each class."""
        from torch.nn import functional as F

        prompts = [template.replace(PLACE, name) for name in self.classes for template in self.templates]
        vectors = text_vectors(model, processor, prompts, self.batch)
        return F.normalize(vectors.unflatten(0, (len(self.classes), -1)).mean(dim=1), dim=-1)  # [K, P, E]


def class_of(caption: str, classes: Sequence[str]) -> str | None:
    """The one class that a caption says as whole words, letter case aside; None where there is not one."""
    said = [name for name in classes if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)]
    longest = [name for name in said if not any(name != other and name.lower() in other.lower() for other in said)]
    return longest[0] if len(longest) == 1 else None
