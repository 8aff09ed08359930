"""LLaVA JSON + image folder: the 558K pre-training format, the 665K mix, LLaVA-NeXT's and OneVision's files.

Format: `[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}]`, or such records
as JSON Lines (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md); `image` may be a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.inputs.files import MediaFolder
from data_pipelines.sample import Annotation, Sample, Turn
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import (
    IMAGE,
    Said,
    count_tags,
    describe_misplaced,
    read_system,
    read_turn,
    tag_first,
    to_turn,
)
from data_pipelines.sources.common.samples import Origin, check_choice, make_sample

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

    images: MediaFolder
    image_first: bool
    untagged: str

    def __post_init__(self) -> None:
        check_choice("untagged", self.untagged, UNTAGGED)

    def parse_record(self, record: Any, key: str, origin: Origin) -> tuple[Sample, list[bytes]]:
        """The sample of one record, with one annotation. Raises what `ListSource.read_record` may raise."""
        if record.get("video"):
            raise BadSample("names a video; this source reads images")
        image = record.get("image") or []
        paths = [image] if isinstance(image, str) else list(image)
        said = record["conversations"]
        turns = [*read_system(record, said), *map(read_turn, said)]
        tags = count_tags(turns, IMAGE)
        if paths and not tags and self.untagged == "drop":
            paths = []
        elif paths and not tags and self.untagged == "first":
            turns = tag_first(turns, IMAGE, len(paths))
        elif tags != len(paths):
            misplaced = describe_misplaced(turns, IMAGE) if tags < len(paths) else ""
            raise BadSample(f"{tags} {IMAGE} tags in its human turns, {len(paths)} images{misplaced}")
        blobs = [self.images.read(path) for path in paths]
        annotation = Annotation(turns=tuple(self._make_turns(turns)))
        return make_sample(origin, key, blobs, [annotation], {"id": record.get("id"), "images": paths})

    def _make_turns(self, turns: list[Said]) -> Iterator[Turn]:
        numbers = {IMAGE: count()}
        start = int(bool(turns) and turns[0].role == "system")
        if turns[start:] and turns[start].role == "assistant":
            del turns[start]  # LLaVA drops an answer without a question (train.py, preprocess_v1)
        if not turns[start:]:
            raise BadSample("no turns")
        for turn in turns:
            if self.image_first and turn.role == "user" and turn.text.count(IMAGE) == 1:
                turn = turn._replace(text=IMAGE + turn.text.replace(IMAGE, "").strip())
            yield to_turn(turn, numbers)


class LlavaJSON(FileSource):
    """One sample per record of `file`; `images` is the folder its paths start from. `limit` takes the first records."""

    layouts = ("llava_json", "sharegpt")

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        name: str = "llava_json",
        license: str = "",
        split: str = "train",
        image_first: bool = True,
        untagged: str = "bad",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = name, license, split
        self._format = LlavaFormat(images=MediaFolder(images), image_first=image_first, untagged=untagged)
        super().__init__(file, limit)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self.raw[i]
        return self._format.parse_record(record, self.make_key(i, record), self)
