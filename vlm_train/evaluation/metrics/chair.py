"""CHAIR: how much of what a caption names is not in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from data_pipelines.errors import DataError
from data_pipelines.object_names import ObjectNames
from vlm_train.errors import ConfigError


class CHAIR:
    """Caption hallucination: `chair_i`, the share of mentioned objects that are not there; `chair_s`, the share of
    captions that mention such an object; `object_recall`, the share of what is there that is mentioned.

    Rohrbach et al. 2018, arXiv 1809.02156. What is there is what the picture's references name: captions, or lists of
    objects. Every mention counts, as in the authors' code. Without a mention `chair_i` is 0.

    Args:
        objects: the vocabulary, object -> its further names, or a JSON file with it.

    Raises:
        ConfigError: no such vocabulary.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"chair_i": False, "chair_s": False, "object_recall": True}

    def __init__(self, *, objects: Mapping[str, Sequence[str]] | str) -> None:
        try:
            self.names = ObjectNames(objects)
        except DataError as error:
            raise ConfigError(f"metric: {error}") from error

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        mentions = wrong = captions = there = found = 0
        for text, texts in zip(predictions, references, strict=True):
            shown = {name for one in texts for name in self.names.find_mentions(one)}
            said = self.names.find_mentions(text)
            invented = sum(name not in shown for name in said)
            mentions, wrong, captions = mentions + len(said), wrong + invented, captions + (invented > 0)
            there, found = there + len(shown), found + len(shown & {*said})
        return {
            "chair_i": wrong / max(mentions, 1),
            "chair_s": captions / len(predictions),
            "object_recall": found / max(there, 1),
        }
