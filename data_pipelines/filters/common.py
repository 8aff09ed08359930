"""Filters on whole samples: exact duplicates, scores."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.filters import Drop, Filter, check_range, drop_outside, text_of
from data_pipelines.inputs.files import open_parquet, parquet_rows
from data_pipelines.inputs.records import JsonLines
from data_pipelines.sample import ROLES, Sample

KEY = "key"


class Duplicates(Filter):
    """Drops samples that repeat an earlier one: the same bytes of all `media`, and the same `text`.

    Text is compared in lower case, in Unicode form NFKC, with runs of white space as one blank. With one of the two
    alone, samples that have none of it are kept.
    """

    def __init__(self, *, media: bool = True, text: bool = True) -> None:
        if not media and not text:
            raise DataError("duplicates: media=false text=false leaves nothing to compare")
        self.media, self.text = media, text
        self._seen: set[bytes] = set()

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> bytes | None:
        """One hash of what is compared."""
        words = unicodedata.normalize("NFKC", text_of(sample, ROLES)).lower().split() if self.text else []
        content = [hashlib.sha256(blob).hexdigest() for blob in blobs] if self.media else []
        if not words and not content:
            return None
        return hashlib.sha256(json.dumps([content, words]).encode()).digest()

    def verdict(self, key: str, measured: bytes | None) -> Drop | None:
        """Drop a sample that equals an earlier one, and remember the others."""
        if measured in self._seen:
            what = [name for name, used in (("media", self.media), ("text", self.text)) if used]
            return Drop(f"same {' and '.join(what)} as an earlier sample")
        if measured is not None:
            self._seen.add(measured)
        return None


class Scores(Filter):
    """Drops samples by numbers: `ranges` maps a column to its bounds `[low, high]`, either `null`.

    A column is looked up in `file`, a .parquet or .jsonl with a row per sample (`key` and numbers), and without a file
    in the samples' `meta`. A sample without the number is dropped, or kept with `keep_missing`.
    """

    def __init__(
        self, *, ranges: Mapping[str, Sequence[float | None]], file: str | None = None, keep_missing: bool = False
    ) -> None:
        if not ranges:
            raise DataError("scores: no ranges; give ranges={column: [low, high]}")
        for name, bounds in ranges.items():
            if len(bounds) != 2:
                raise DataError(f"scores: ranges.{name} {list(bounds)}; expected [low, high], either null")
            check_range(f"scores: ranges.{name}", *bounds)
        if file is not None and not Path(file).is_file():
            raise DataError(f"scores: file {file}: no such file")
        self.ranges = {name: (low, high) for name, (low, high) in ranges.items()}
        self.file, self.keep_missing = file, keep_missing
        self._table: dict[str, dict[str, Any]] | None = None  # read where verdicts are given, not in every process

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> dict[str, Any]:
        """The numbers of the sample's `meta`."""
        return {name: sample.meta.get(name) for name in self.ranges} if self.file is None else {}

    def verdict(self, key: str, measured: dict[str, Any]) -> Drop | None:
        """Compares the numbers with their ranges."""
        if self.file is not None:
            if self._table is None:
                self._table = read_scores(Path(self.file), list(self.ranges))
            measured = self._table.get(key, {})
        for name, (low, high) in self.ranges.items():
            value = measured.get(name)
            if not isinstance(value, (int, float)) or value != value:
                if self.keep_missing:
                    continue
                return Drop(f"no {name}")
            if reason := drop_outside(name, value, low, high):
                return reason
        return None


def read_scores(path: Path, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`{key: {column: number}}` of a .parquet or .jsonl. Raises `DataError` for other files and missing columns."""
    rows = _read_parquet(path, columns) if path.suffix == ".parquet" else _json_lines(path)
    table: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
            raise DataError(f"{path}, row {number}: expected an object with a text {KEY!r}")
        if row[KEY] in table:
            raise DataError(f"{path}, row {number}: key {row[KEY]!r} was there before")
        table[row[KEY]] = {name: row.get(name) for name in columns}
    return table


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    found = open_parquet(path).schema_arrow.names
    missing = [name for name in (KEY, *columns) if name not in found]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; its columns: {', '.join(found)}")
    return parquet_rows(path, [KEY, *columns])


def _json_lines(path: Path) -> Iterator[Any]:
    records = JsonLines(path, "scores: file")
    for i in range(len(records)):
        try:
            yield records[i]
        except BadSample as error:
            raise DataError(f"{path}, line {records.line_number(i)}: {error}") from error
