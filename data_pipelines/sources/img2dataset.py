"""Web images with captions as img2dataset writes them: CC3M, CC12M, SBU, COYO, LAION and the like.

Source: github.com/rom1504/img2dataset, img2dataset/writer.py. Its `output_format`s:
webdataset: `00000.tar` with `<key>.jpg`, `<key>.txt`, `<key>.json`; failed downloads are left out of the tar.
parquet: `00000.parquet`, one row per URL with `key`, `jpg` (null if it failed), `txt`, `status`, `error_message` ...
files: `00000/<key>.jpg`, `.txt`, `.json`.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipelines.errors import EMPTY, BadSample, DataError
from data_pipelines.inputs.files import find_files, open_parquet, parquet_rows, parse_json
from data_pipelines.media.limits import MAX_BYTES
from data_pipelines.sample import Sample
from data_pipelines.shards.members import (
    ALLOWED,
    JSON,
    MEDIA,
    TEXT,
    caption_annotation,
    check_end,
    is_plain,
    member_extension,
    open_tar,
    unique_key,
)
from data_pipelines.sources import Record
from data_pipelines.sources.common.layouts import hint_at_source
from data_pipelines.sources.common.samples import check_choice, make_sample, try_record

FORMATS = ("webdataset", "parquet", "files")
FAILED = ("bad", "drop")

Group = tuple[str, list[tuple[str, bytes]]]
"""A key and its members: name without the key, bytes."""


class Img2Dataset:
    """One sample per downloaded image; each tar, parquet file or folder is a part.

    `columns` are taken from the JSON or the row into `meta`, for filters by a threshold. A row whose download failed is
    a `BadSample` that says why, or, with `failed` drop, passed over. Raises `DataError` for a folder without parts.
    """

    def __init__(
        self,
        *,
        folder: str,
        format: str = "webdataset",  # noqa: A002 (img2dataset's own word is output_format)
        columns: Sequence[str] = ("url",),
        failed: str = "bad",
        name: str = "img2dataset",
        license: str = "",
        split: str = "train",
    ) -> None:
        self.name, self.license, self.split = name, license, split
        self._format, self._columns = check_choice("format", format, FORMATS), tuple(columns)
        self._drop = check_choice("failed", failed, FAILED) == "drop"
        self._parts = _find_files(Path(folder), format)

    @property
    def parts(self) -> int:
        """Number of tars, parquet files or folders."""
        return len(self._parts)

    def read(self, part: int) -> Iterator[Record]:
        """The records of one of them."""
        path = self._parts[part]
        if self._format == "parquet":
            yield from self._read_rows(path)
            return
        for group in _read_tar(path) if self._format == "webdataset" else _read_folder(path):
            if isinstance(group, BadSample):
                yield group
            else:
                yield try_record(partial(self._from_members, *group), partial("{}: {!r}".format, path, group[0]))

    def _from_members(self, key: str, members: list[tuple[str, bytes]]) -> tuple[Sample, list[bytes]]:
        by_kind = {member_extension(name): data for name, data in members}
        images = [data for name, data in members if member_extension(name) in MEDIA]
        if len(by_kind) < len(members) or len(images) != 1:
            raise BadSample(f"members {[name for name, _ in members]}; expected one image, one txt and one json")
        row = parse_json(by_kind[JSON]) if JSON in by_kind else {}
        if not isinstance(row, dict):
            raise BadSample(f"its json holds a {type(row).__name__}, not an object")
        if TEXT in by_kind:
            row = {**row, "caption": by_kind[TEXT].decode("utf-8", errors="replace")}
        return self._make_sample(key, images[0], row)

    def _read_rows(self, path: Path) -> Iterator[Record]:
        known = set(open_parquet(path).schema_arrow.names)
        missing = {"key", "jpg", *self._columns} - known
        if missing or not known & {"caption", TEXT}:
            hint = hint_at_source(dict.fromkeys(sorted(known), ""))
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing or {TEXT}))}; it has {sorted(known)}{hint}"
            )
        columns = {"key", "jpg", "caption", TEXT, "status", "error_message", *self._columns} & known
        for row in parquet_rows(path, sorted(columns)):
            if not (self._drop and _has_failed(row)):
                yield try_record(partial(self._from_row, row), partial("{}: {!r}".format, path, row["key"]))

    def _from_row(self, row: Mapping[str, Any]) -> tuple[Sample, list[bytes]]:
        if _has_failed(row):
            raise BadSample(f"status {row.get('status')!r}: {row.get('error_message')}")
        caption = row.get(TEXT) if row.get("caption") is None else row["caption"]
        return self._make_sample(str(row["key"]), row["jpg"], {**row, "caption": caption})

    def _make_sample(self, key: str, image: bytes, row: Mapping[str, Any]) -> tuple[Sample, list[bytes]]:
        missing = [column for column in self._columns if column not in row]
        if missing:
            raise BadSample(f"has no column {', '.join(missing)}; it has {', '.join(row)}")
        caption = row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample("has no caption", kind=EMPTY)
        meta = {column: _to_json_value(row[column]) for column in self._columns}
        return make_sample(self, unique_key(key), [image], [caption_annotation(caption.strip())], meta)


def _find_files(folder: Path, kind: str) -> list[Path]:
    if kind != "files":
        return find_files(folder, ".tar" if kind == "webdataset" else ".parquet")
    found = sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
    if not found:
        raise DataError(f"folder: {folder} holds no folders 00000, 00001 ...")
    return found


def _has_failed(row: Mapping[str, Any]) -> bool:
    return row["jpg"] is None or row.get("status", "success") != "success"


def _to_json_value(value: Any) -> Any:
    """`value` as JSON has it: no NaN, and nothing but text and numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _read_tar(path: Path) -> Iterator[Group | BadSample]:
    """The samples of a tar. What is refused costs its own sample alone; after a cut, what came before it stays."""
    try:
        with open_tar(path) as tar:
            for key, found in groupby(_read_members(tar), key=itemgetter(0)):
                members = [(name, data) for _, name, data in found]
                refused = [name for name, data in members if data is None]
                if refused:
                    yield BadSample(f"{path}: {key!r}: member {refused[0]!r} refused")
                else:
                    yield key, [(name, data) for name, data in members if data is not None]
            check_end(tar)
    except (tarfile.TarError, OSError) as error:
        yield BadSample(f"{path}: truncated or not an uncompressed tar, the rest of it is lost: {error}")


def _read_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, name and bytes of every member; no bytes where it is a link, too large, or of a kind that is not read."""
    for info in tar:
        if info.isdir():
            continue
        folder, _, base = info.name.removeprefix("./").rpartition("/")
        key, _, name = base.partition(".")
        file = tar.extractfile(info) if is_plain(info) and _is_wanted(name, info.size) else None
        data = file.read() if file else None
        if data is not None and len(data) != info.size:
            raise tarfile.ReadError(f"{info.name!r} has {len(data)} of {info.size} bytes")
        yield f"{folder}/{key}" if folder else key, name, data


def _read_folder(path: Path) -> Iterator[Group | BadSample]:
    files: Iterable[Path] = sorted(file for file in path.iterdir() if file.is_file())
    for key, found in groupby(files, key=lambda file: file.name.partition(".")[0]):
        members = [(file.name.partition(".")[2], file) for file in found]
        refused = [file.name for name, file in members if not _is_wanted(name, file.stat().st_size)]
        if refused:
            yield BadSample(f"{path}: {key!r}: file {refused[0]!r} refused")
        else:
            yield key, [(name, file.read_bytes()) for name, file in members]


def _is_wanted(name: str, size: int) -> bool:
    return member_extension(name) in ALLOWED and size <= MAX_BYTES
