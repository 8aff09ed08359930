"""Qwen-VL's fine-tuning format: images and boxes written into the text.

`[{"id", "conversations": [{"from": "user" | "assistant", "value": "Picture 1: <img>path</img>\\n..."}]}]`, regions as
`<ref>the dog</ref><box>(x1,y1),(x2,y2)</box>` in thousandths of width and height
(github.com/QwenLM/Qwen-VL, README.md, Fine-tuning).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import BadSample, DataError
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Box, Media, Part, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.conversations import ROLES, MediaFolder, make_sample, read_records

SCALE = 1000
TOKEN = re.compile(r"(?:Picture \d+: )?<img>(?P<image>.*?)</img>\n?|<box>(?P<box>.*?)</box>", re.DOTALL)
BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")


class QwenVL(ListSource):
    """One sample per record, with one annotation. `file` is the JSON (or JSON Lines), `images` the folder of its paths.

    "Picture n: " and the line break after an image belong to the template and are left out, and so are the tags
    around a region's words, unless `keep_refs`. A box is of the image shown last before it.
    """

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        keep_refs: bool = False,
        name: str = "qwen_vl",
        licence: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.licence, self.split, self.keep_refs = name, licence, split, keep_refs
        self._images = MediaFolder(images, "images")
        if not file.endswith((".json", ".jsonl")):
            raise DataError(f"file: {file}; allowed: .json, .jsonl")
        self._records = read_records(Path(file))[:limit]

    def __len__(self) -> int:
        return len(self._records)

    def label(self, i: int) -> str:
        """The record's own id, where it has one."""
        record = self._records[i]
        return f"record {record.get('id', i) if isinstance(record, dict) else i!r}"

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self._records[i]
        if isinstance(record, BadSample):
            raise record
        paths: list[str] = []
        turns = []
        for turn in record["conversations"]:
            if turn["from"] not in ROLES:
                raise BadSample(f"turn from {turn['from']!r}; allowed: {', '.join(ROLES)}")
            turns.append(Turn(role=ROLES[turn["from"]], parts=tuple(self._parts(turn["value"], paths))))
        if not any(turn.role == "assistant" for turn in turns):
            raise BadSample("no turn of the assistant")
        return make_sample(
            safe_key(f"{i:07d}-{record.get('id', '')}"),
            [self._images.read(path) for path in paths],
            [Annotation(turns=tuple(turns))],
            source=self.name,
            licence=self.licence,
            meta={"id": record.get("id"), "images": paths},
        )

    def _parts(self, value: str, paths: list[str]) -> Iterator[Part]:
        """The parts of a turn; the paths of its images are appended to `paths`."""
        end = 0
        for found in TOKEN.finditer(value):
            yield from self._text(value[end : found.start()])
            end = found.end()
            if found["image"] is not None:
                paths.append(found["image"].strip())
                yield Media(item=len(paths) - 1)
            else:
                yield box(found["box"], paths)
        yield from self._text(value[end:])

    def _text(self, text: str) -> Iterator[Text]:
        text = text if self.keep_refs else re.sub("</?ref>", "", text)
        if text:
            yield Text(text=text)


def box(corners: str, images: Sequence[str]) -> Box:
    """`(x1,y1),(x2,y2)` in thousandths, of the last image. Raises `BadSample`."""
    found = BOX.fullmatch(corners.strip())
    if found is None:
        raise BadSample(f"box {corners!r}; expected (x1,y1),(x2,y2)")
    if not images:
        raise BadSample(f"box {corners!r} before any image")
    x1, y1, x2, y2 = (int(value) / SCALE for value in found.groups())
    if not (x1 <= x2 <= 1 and y1 <= y2 <= 1):
        raise BadSample(f"box {corners!r}; its corners must be ordered, from 0 to {SCALE}")
    return Box(item=len(images) - 1, xyxy=(x1, y1, x2, y2))
