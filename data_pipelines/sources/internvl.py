"""InternVL's fine-tuning data: a meta file that names JSON Lines files of conversations.

`{"name": {"root": image folder, "annotation": "x.jsonl", "data_augment": bool, "repeat_time": number, "length": n}}`,
records `{"id", "image": path | [paths], "video": path, "width", "height" (or "width_list", "height_list"),
"conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}`
(github.com/OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_json
from data_pipelines.inputs.records import describe_record, read_records
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.conversations import make_dialogue
from data_pipelines.sources.common.samples import make_sample


class InternVL(ListSource):
    """One sample per record, with one annotation; the data sets follow each other in the order of the meta file.

    `folder` is where its `root` and `annotation` paths start from, and they cannot leave it. `names` takes some data
    sets only. `repeat` follows `repeat_time`: below 1 the first share of the records, above 1 all of them so many times
    (whole numbers only, as InternVL requires); false: every record once. Images without a tag come before the first
    human turn's text. `data_augment` and `length` are not read.
    """

    def __init__(
        self,
        *,
        meta: str,
        folder: str = ".",
        names: Sequence[str] | None = None,
        repeat: bool = True,
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = "internvl", license, split
        sets = _read_meta(Path(meta), names)
        self._sets = [_DataSet(name, license, entry, Path(folder), repeat) for name, entry in sets.items()]
        self._ends = list(accumulate(len(one) for one in self._sets))
        self._size = self._ends[-1] if limit is None else min(limit, self._ends[-1])

    def __len__(self) -> int:
        return self._size

    def name_record(self, i: int) -> str:
        """The data set and the record's id or line."""
        which, number = self._locate_record(i)
        return self._sets[which].name_record(number)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of all data sets."""
        which, number = self._locate_record(i)
        return self._sets[which].read_sample(number, key=f"{i:08d}")

    def _locate_record(self, i: int) -> tuple[int, int]:
        which = bisect_right(self._ends, i)
        return which, i - (self._ends[which - 1] if which else 0)


class _DataSet:
    """One entry of the meta file. The name is the `source` of its samples."""

    def __init__(self, name: str, license: str, entry: Mapping[str, Any], folder: Path, repeat: bool) -> None:
        self.name, self.license = name, license
        try:
            annotation, root = _path_inside(folder, entry["annotation"]), _path_inside(folder, entry["root"])
            times = entry.get("repeat_time", 1) if repeat else 1
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"meta: {name}: malformed: {type(error).__name__}: {error}") from error
        if not isinstance(times, int | float) or times <= 0 or (times > 1 and times != int(times)):
            raise DataError(f"meta: {name}: repeat_time {times!r}; allowed: above 0, and whole above 1")
        if annotation.suffix != ".jsonl":
            raise DataError(f"meta: {name}: annotation {annotation}; allowed: .jsonl")
        self._files = MediaFolder(root, f"meta: {name}: root")
        self._records = read_records(annotation, f"meta: {name}: annotation")
        self._taken = range(len(self._records))[: int(len(self._records) * min(times, 1))]
        self._times = max(1, int(times))

    def __len__(self) -> int:
        return len(self._taken) * self._times

    def name_record(self, number: int) -> str:
        """The data set and the record's id or line."""
        return f"{self.name}, {describe_record(self._records, number % len(self._taken))}"

    def read_sample(self, number: int, *, key: str) -> tuple[Sample, list[bytes]]:
        """Record `number`, counted over all repetitions."""
        record = self._records[number % len(self._taken)]
        images, videos = _list_paths(record, "image"), _list_paths(record, "video")
        blobs = [self._files.read(path) for path in (*images, *videos)]
        annotation = make_dialogue(record, images=len(images), videos=len(videos))
        meta = {"id": record.get("id"), "images": images, "videos": videos}
        return make_sample(self, f"{key}-{record.get('id', '')}", blobs, [annotation], meta)


def _list_paths(record: Mapping[str, Any], name: str) -> list[str]:
    value = record.get(name) or []
    return [value] if isinstance(value, str) else list(value)


def _path_inside(folder: Path, path: str) -> Path:
    """`path` below `folder`. Raises `DataError` if it leaves it."""
    inside = folder / path
    if not Path(os.path.abspath(inside)).is_relative_to(os.path.abspath(folder)) or ".." in Path(path).parts:
        raise DataError(f"meta: path {path!r} leaves the folder {folder} (folder=<folder>)")
    return inside


def _read_meta(path: Path, names: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    sets = read_json(path, "meta")
    if not isinstance(sets, dict) or not sets:
        raise DataError(f"meta: {path}: expected an object of data sets, got {str(sets)[:80]}")
    if unknown := sorted(set(names or ()) - set(sets)):
        raise DataError(f"names: {', '.join(unknown)} not in {path}; allowed: {', '.join(sets)}")
    return {name: entry for name, entry in sets.items() if names is None or name in names}
