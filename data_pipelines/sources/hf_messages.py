"""Conversations with media in Hugging Face `datasets`: parquet files of the hub, or a `save_to_disk` folder.

Columns: `messages` or `conversations` as in `messages` (content as text or as a list of parts), or TRL's preference
layout `prompt`, `chosen`, `rejected` (huggingface.co/docs/trl, dataset_formats); and `images` and `videos`, lists of
`{"bytes", "path"}` as the Image and Video features store them, or one such `image` or `video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, open_parquet, parquet_rows, require_module
from data_pipelines.sources import PART_SIZE, Record
from data_pipelines.sources.common.layouts import hint_at_source
from data_pipelines.sources.common.samples import try_record
from data_pipelines.sources.messages import parse_record, read_media

COLUMNS = (
    "id",
    "system",
    "system_prompt",
    "messages",
    "conversations",
    "prompt",
    "chosen",
    "rejected",
    "images",
    "image",
    "videos",
    "video",
)
BATCH = 64  # rows of a saved dataset in memory at once


class HFMessages:
    """One sample per row. A part is a row group of a parquet file, or a run of rows of a `save_to_disk` folder.

    `pattern` chooses the parquet files below `folder`. `subset` names the split of a saved `DatasetDict`. `media` is
    the folder for images and videos that are stored as paths without bytes.
    """

    def __init__(
        self,
        *,
        folder: str,
        pattern: str = "**/*.parquet",
        subset: str | None = None,
        media: str | None = None,
        name: str = "hf_messages",
        license: str = "",
        split: str = "train",
    ) -> None:
        self.name, self.license, self.split = name, license, split
        self._media = MediaFolder(media, "media")
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise DataError(f"folder: no such folder: {folder}")
        self._saved = _find_saved(self._folder, subset)
        self._parts = _split_rows(self._saved) if self._saved else _row_groups(self._folder, pattern)

    @property
    def parts(self) -> int:
        """Number of row groups or runs of rows."""
        return len(self._parts)

    def read(self, part: int) -> Iterator[Record]:
        """The records of one of them."""
        path, file, start, group = self._parts[part]
        rows = _saved_rows(path, start) if self._saved else _parquet_rows(path, group)
        for number, row in enumerate(rows, start):
            make = partial(parse_record, row, f"{file:05d}-{number:08d}", self._read_image, self)
            yield try_record(make, partial("{}, row {}".format, path.relative_to(self._folder), number))

    def _read_image(self, item: Any) -> bytes:
        return read_media(item, self._media)


Part = tuple[Path, int, int, int]
"""File or folder, its number, the part's first row, and the number of its row group."""


def _find_saved(folder: Path, subset: str | None) -> Path | None:
    """The folder of a saved `Dataset`, if `folder` is one, or a saved `DatasetDict`."""
    if (folder / "state.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    found = sorted(path.parent.name for path in folder.glob("*/state.json"))
    if subset not in found:
        raise DataError(f"subset: got {subset!r}; {folder} holds {', '.join(found)}")
    return folder / str(subset)


def _check_columns(where: Path, columns: list[str]) -> None:
    if not {"messages", "conversations", "chosen"} & set(columns):
        hint = hint_at_source(dict.fromkeys(columns, ""))
        raise DataError(f"{where} has no column messages, conversations or chosen; it has {', '.join(columns)}{hint}")


def _row_groups(folder: Path, pattern: str) -> list[Part]:
    parts: list[Part] = []
    for number, path in enumerate(sorted(folder.glob(pattern))):
        file = open_parquet(path)
        _check_columns(path, file.schema_arrow.names)
        start = 0
        for group in range(file.num_row_groups):
            parts.append((path, number, start, group))
            start += file.metadata.row_group(group).num_rows
    if not parts:
        raise DataError(f"folder: {folder} holds no rows in {pattern}, and is not a folder of datasets' save_to_disk")
    return parts


def _parquet_rows(path: Path, group: int) -> Iterator[dict[str, Any]]:
    known = open_parquet(path).schema_arrow.names
    return parquet_rows(path, [name for name in COLUMNS if name in known], [group])


def _load_dataset(path: Path) -> Any:
    """A saved dataset whose rows come as Arrow stores them: no image is decoded."""
    try:
        dataset = require_module("datasets").load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a dataset that load_from_disk reads: {error}") from error
    return dataset.select_columns([name for name in COLUMNS if name in dataset.column_names]).with_format("arrow")


def _split_rows(path: Path) -> list[Part]:
    dataset = _load_dataset(path)
    _check_columns(path, dataset.column_names)
    return [(path, 0, start, 0) for start in range(0, len(dataset), PART_SIZE)]


def _saved_rows(path: Path, start: int) -> Iterator[dict[str, Any]]:
    dataset = _load_dataset(path)
    end = min(start + PART_SIZE, len(dataset))
    for first in range(start, end, BATCH):
        yield from dataset[first : min(first + BATCH, end)].to_pylist()
