"""Preference pairs: a question about an image, or several, a chosen and a rejected answer.

RLHF-V-Dataset (huggingface.co/datasets/openbmb/RLHF-V-Dataset, CC BY-NC 4.0): parquet with `ds_name`, `image`
({bytes, path}), `text` (JSON with question, chosen, rejected), `origin_dataset`, `origin_split`, `idx`, `image_path`.
RLAIF-V-Dataset has question, chosen and rejected as columns; so have pairs of one's own, with `image` as a path, and
MMPR (huggingface.co/datasets/OpenGVLab/MMPR): jsonl files in which `image` may be a list, and `<image>` in the question
marks their places.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, parse_json
from data_pipelines.sample import Annotation, Sample, Text, Turn
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import IMAGE, make_dialogue
from data_pipelines.sources.common.samples import make_exchange, make_sample

FIELDS = ("question", "chosen", "rejected")
ORIGIN = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")


class PreferencePairs(FileSource):
    """One sample per pair. `file` is .parquet, .json, .jsonl or .csv; `images` the folder of images given as paths.

    `changed_weight` weighs the words in which the two answers differ, in both of them (RLHF-V, arXiv:2312.00849, dense
    DPO: 5; its code compares tokens, here words are compared).
    """

    layouts = ("preference_pairs",)

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        changed_weight: float = 1.0,
        name: str = "preference_pairs",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        if not changed_weight > 0:
            raise DataError(f"changed_weight: got {changed_weight}; allowed: above 0")
        self.name, self.license, self.split, self.changed_weight = name, license, split, changed_weight
        self._images = MediaFolder(images)
        super().__init__(file, limit)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Pair i of the file."""
        record = self.raw[i]
        text = record.get("text")
        pair = record if "chosen" in record else parse_json(text) if isinstance(text, str) else text
        for name in FIELDS:
            if not isinstance(pair[name], str) or not pair[name].strip():
                raise BadSample(f"{name} is empty or no text")
        image = record.get("image") or []
        images = image if isinstance(image, list) else [image]
        annotation = self._make_annotation(*(pair[name].strip() for name in FIELDS), images=len(images))
        meta = {name: record[name] for name in ORIGIN if name in record}
        blobs = [self._read_image(image) for image in images]
        return make_sample(self, f"{i:07d}-{record.get('idx', '')}", blobs, [annotation], meta)

    def _make_annotation(self, ask: str, chosen: str, rejected: str, *, images: int) -> Annotation:
        if chosen == rejected:
            raise BadSample("the chosen answer is the rejected one")
        made = make_exchange(ask, chosen, items=range(images), rejected=rejected)
        if IMAGE in ask:
            said = [{"from": "human", "value": ask}, {"from": "gpt", "value": chosen}]
            made = replace(made, turns=make_dialogue({"conversations": said}, images=images).turns)
        if self.changed_weight == 1.0:
            return made
        better, worse = find_changed_spans(chosen, rejected)
        turns = (made.turns[0], self._weigh_turn(made.turns[1], better))
        return replace(made, turns=turns, rejected=self._weigh_turn(made.rejected or made.turns[1], worse))

    def _weigh_turn(self, turn: Turn, spans: list[tuple[int, int]]) -> Turn:
        weights = tuple((start, end, self.changed_weight) for start, end in spans)
        return replace(turn, parts=(Text(text=turn.text, weights=weights),))

    def _read_image(self, image: Any) -> bytes:
        if isinstance(image, Mapping) and image.get("bytes"):
            data = image["bytes"]
            return base64.b64decode(data, validate=True) if isinstance(data, str) else bytes(data)
        return self._images.read(image["path"] if isinstance(image, Mapping) else image)


class RLHFV(PreferencePairs):
    """RLHF-V-Dataset and RLAIF-V-Dataset as published: parquet with the images inside. See `PreferencePairs`."""

    def __init__(
        self,
        *,
        file: str,
        changed_weight: float = 5.0,
        name: str = "rlhf_v",
        license: str = "CC-BY-NC-4.0",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        super().__init__(file=file, changed_weight=changed_weight, name=name, license=license, split=split, limit=limit)


def find_changed_spans(first: str, second: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The character spans of the words of two texts that the other one has not there."""
    words = [list(re.finditer(r"\w+|[^\w\s]", text)) for text in (first, second)]
    old, new = ([word.group() for word in some] for some in words)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for what, *bounds in matcher.get_opcodes():
        if what == "equal":
            continue
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            if start < end:
                spans[side].append((words[side][start].start(), words[side][end - 1].end()))
    return spans
