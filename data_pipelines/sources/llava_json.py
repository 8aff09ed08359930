"""LLaVA JSON + image folder: the 558K pre-training format, the 665K mix, LLaVA-NeXT's and OneVision's files.

Format: `[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}]`, or such records
as JSON Lines (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md); `image` may be a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media import image_item
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Media, Part, Role, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.files import ImageFolder, place, read_records

TAG = "<image>"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
UNTAGGED = ("bad", "first", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaFormat:
    """How one record becomes a sample.

    Images are numbered in the order of their tags in the human turns. A turn's only image comes before its text with
    `image_first`, wherever its tag stands, as LLaVA trains it (llava/train/train.py, preprocess_multimodal); line
    breaks around a tag belong to the template. `untagged` says what a record with images and no tag is: unusable
    (bad), a sample whose images come `first` in its first human turn, or one without images (drop), as LLaVA-NeXT in
    effect trains it.
    """

    images: ImageFolder
    image_first: bool
    untagged: str

    def __post_init__(self) -> None:
        if self.untagged not in UNTAGGED:
            raise DataError(f"untagged: got {self.untagged!r}; allowed: {', '.join(UNTAGGED)}")

    def sample(self, record: Any, key: str, source: str, licence: str) -> tuple[Sample, list[bytes]]:
        """The sample of one record, with one annotation. Raises what `ListSource.record` may raise."""
        if record.get("video"):
            raise BadSample("names a video; this source reads images")
        image = record.get("image") or []
        paths = [image] if isinstance(image, str) else list(image)
        conversations = [_message(turn) for turn in record["conversations"]]
        tags = sum(value.count(TAG) for role, value in conversations if role == "user")
        if paths and not tags:
            paths, conversations = self._untagged(paths, conversations)
        elif tags != len(paths):
            raise BadSample(f"{tags} {TAG} tags in its human turns, {len(paths)} images")
        blobs = [self.images.read(path) for path in paths]
        return Sample(
            key=key,
            media=tuple(image_item(number, blob) for number, blob in enumerate(blobs)),
            annotations=(Annotation(turns=tuple(self._turns(conversations))),),
            source=source,
            licence=licence,
            meta={"id": record.get("id"), "images": paths},
        ), blobs

    def _untagged(
        self, paths: list[str], conversations: list[tuple[Role, str]]
    ) -> tuple[list[str], list[tuple[Role, str]]]:
        if self.untagged == "drop":
            return [], conversations
        first = next((number for number, (role, _) in enumerate(conversations) if role == "user"), None)
        if self.untagged == "bad" or first is None:
            raise BadSample(f"0 {TAG} tags in its human turns, {len(paths)} images")
        tagged: tuple[Role, str] = ("user", TAG * len(paths) + conversations[first][1])
        return paths, [*conversations[:first], tagged, *conversations[first + 1 :]]

    def _turns(self, conversations: list[tuple[Role, str]]) -> Iterator[Turn]:
        numbers = count()
        start = int(bool(conversations) and conversations[0][0] == "system")
        if conversations[start:] and conversations[start][0] == "assistant":
            del conversations[start]  # LLaVA drops an answer without a question (train.py, preprocess_v1)
        if not conversations[start:]:
            raise BadSample("no turns")
        for role, value in conversations:
            if role == "user":
                if self.image_first and value.count(TAG) == 1:
                    value = TAG + value.replace(TAG, "").strip()
                yield Turn(role=role, parts=split_tags(value, numbers))
            else:  # a tag in an answer is text, for example in code
                yield Turn(role=role, parts=(Text(text=value),))


class LlavaJSON(ListSource):
    """One sample per record of `file`; `images` is the folder its paths start from. `limit` takes the first records."""

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        name: str = "llava_json",
        licence: str = "",
        split: str = "train",
        image_first: bool = True,
        untagged: str = "bad",
        limit: int | None = None,
    ) -> None:
        self.name, self.licence, self.split = name, licence, split
        self._format = LlavaFormat(images=ImageFolder(images), image_first=image_first, untagged=untagged)
        self._records = read_records(Path(file))
        self._count = min(len(self._records), len(self._records) if limit is None else limit)

    def __len__(self) -> int:
        return self._count

    def label(self, i: int) -> str:
        """The record's own id, where it has one."""
        return place(self._records, i)

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self._records[i]
        return self._format.sample(record, safe_key(f"{i:07d}-{record.get('id', '')}"), self.name, self.licence)


def split_tags(text: str, numbers: Iterator[int]) -> tuple[Part, ...]:
    """`text` with a media part, numbered by `numbers`, for every `<image>`, without the line breaks around it."""
    parts: list[Part] = []
    for piece in re.split(rf"\n?({TAG})\n?", text):
        if piece == TAG:
            parts.append(Media(item=next(numbers)))
        elif piece:
            parts.append(Text(text=piece))
    return tuple(parts)


def _message(turn: Mapping[str, str]) -> tuple[Role, str]:
    role = ROLES.get(turn["from"])
    if role is None:
        raise BadSample(f"turn from {turn['from']!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(turn["value"], str):
        raise TypeError(f"a turn's value is {turn['value']!r}, not text")
    return role, turn["value"]
