"""Qwen-VL's fine-tuning format: images and boxes written into the text.

`[{"id", "conversations": [{"from": "user" | "assistant", "value": "Picture 1: <img>path</img>\\n..."}]}]`, regions as
`<ref>the dog</ref><box>(x1,y1),(x2,y2)</box>` in thousandths of width and height
(github.com/QwenLM/Qwen-VL, README.md, Fine-tuning).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from data_pipelines.errors import BadSample
from data_pipelines.inputs.files import MediaFolder
from data_pipelines.sample import Annotation, Box, Media, Part, Sample, Text, Turn
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import read_system, read_turn
from data_pipelines.sources.common.samples import make_sample

SCALE = 1000
TOKEN = re.compile(r"(?:Picture \d+: )?<img>(?P<image>.*?)</img>\n?|<box>(?P<box>.*?)</box>", re.DOTALL)
BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")


class QwenVL(FileSource):
    """One sample per record, with one annotation. `file` is the JSON (or JSON Lines), `images` the folder of its paths.

    "Picture n: " and the line break after an image belong to the template and are left out, and so are the tags
    around a region's words, unless `keep_refs`. A box is of the image shown last before it.
    """

    layouts = ("qwen_vl", "sharegpt")

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        keep_refs: bool = False,
        name: str = "qwen_vl",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split, self.keep_refs = name, license, split, keep_refs
        self._images = MediaFolder(images)
        super().__init__(file, limit)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self.raw[i]
        paths: list[str] = []
        said = record["conversations"]
        turns = [
            Turn(role=turn.role, parts=tuple(self._make_parts(turn.text, paths)), weight=turn.weight)
            for turn in (*read_system(record, said), *map(read_turn, said))
        ]
        if not any(turn.role == "assistant" for turn in turns):
            raise BadSample("no turn of the assistant")
        blobs = [self._images.read(path) for path in paths]
        meta = {"id": record.get("id"), "images": paths}
        return make_sample(self, self.make_key(i, record), blobs, [Annotation(turns=tuple(turns))], meta)

    def _make_parts(self, value: str, paths: list[str]) -> Iterator[Part]:
        """The parts of a turn; the paths of its images are appended to `paths`."""
        end = 0
        for found in TOKEN.finditer(value):
            yield from self._make_text(value[end : found.start()])
            end = found.end()
            if found["image"] is not None:
                paths.append(found["image"].strip())
                yield Media(item=len(paths) - 1)
            else:
                yield parse_box(found["box"], paths)
        yield from self._make_text(value[end:])

    def _make_text(self, text: str) -> Iterator[Text]:
        text = text if self.keep_refs else re.sub("</?ref>", "", text)
        if text:
            yield Text(text=text)


def parse_box(corners: str, images: Sequence[str]) -> Box:
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
