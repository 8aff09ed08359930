"""LLaVA JSON + image folder: the 558K pre-training format and the 665K mix, text-only records included.

Format: `[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}]`
(github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md); `image` may be a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

from data_pipelines.errors import BadSample
from data_pipelines.media import image_item
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Media, Part, Role, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.files import ImageFolder, read_records

TAG = "<image>"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


class LlavaJSON(ListSource):
    """One sample per record, with one annotation. `file` is the JSON, `images` the folder its paths start from.

    Images are numbered in the order of their tags in the human turns. A turn's only image comes before its text with
    `image_first`, wherever its tag stands, as LLaVA trains it (llava/train/train.py, preprocess_multimodal); line
    breaks around a tag belong to the template. `limit` takes the first records only.
    """

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        name: str = "llava_json",
        licence: str = "",
        split: str = "train",
        image_first: bool = True,
        limit: int | None = None,
    ) -> None:
        self.name, self.licence, self.split, self.image_first = name, licence, split, image_first
        self._images = ImageFolder(images)
        self._records = read_records(Path(file))
        self._count = min(len(self._records), len(self._records) if limit is None else limit)

    def __len__(self) -> int:
        return self._count

    def label(self, i: int) -> str:
        """The record's own id, where it has one."""
        record = self._records[i]
        return f"record {record.get('id', i) if isinstance(record, dict) else i!r}"

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self._records[i]
        image = record.get("image") or []
        paths = [image] if isinstance(image, str) else list(image)
        conversations = record["conversations"]
        tags = sum(turn["value"].count(TAG) for turn in conversations if turn["from"] == "human")
        if tags != len(paths):
            raise BadSample(f"{tags} {TAG} tags in its human turns, {len(paths)} images")
        blobs = [self._images.read(path) for path in paths]
        return Sample(
            key=safe_key(f"{i:07d}-{record.get('id', '')}"),
            media=tuple(image_item(number, blob) for number, blob in enumerate(blobs)),
            annotations=(Annotation(turns=tuple(self._turns(conversations))),),
            source=self.name,
            licence=self.licence,
            meta={"id": record.get("id"), "images": paths},
        ), blobs

    def _turns(self, conversations: list[Mapping[str, str]]) -> Iterator[Turn]:
        numbers = count()
        if conversations and conversations[0]["from"] == "gpt":
            conversations = conversations[1:]  # LLaVA drops an answer without a question (train.py, preprocess_v1)
        if not conversations:
            raise BadSample("no turns")
        for turn in conversations:
            role = ROLES.get(turn["from"])
            if role is None:
                raise BadSample(f"turn from {turn['from']!r}; allowed: {', '.join(ROLES)}")
            if role == "user":
                yield Turn(role=role, parts=self._split(turn["value"], numbers))
            else:  # a tag in an answer is text, for example in code
                yield Turn(role=role, parts=(Text(text=turn["value"]),))

    def _split(self, value: str, numbers: Iterator[int]) -> tuple[Part, ...]:
        if self.image_first and value.count(TAG) == 1:
            value = TAG + value.replace(TAG, "").strip()
        parts: list[Part] = []
        for piece in re.split(rf"\n?({TAG})\n?", value):
            if piece == TAG:
                parts.append(Media(item=next(numbers)))
            elif piece:
                parts.append(Text(text=piece))
        return tuple(parts)
