"""Pictures with texts in one table: JSON Lines, a JSON list, CSV, TSV or parquet, one picture and its text a row.

The picture is a path, a data URI, or bytes (parquet, as `{"bytes", "path"}` of Hugging Face's Image or as they are).
The text is one text or a list of texts; rows with the same path are captions, or questions, of one picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.errors import EMPTY, BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, open_parquet, parquet_rows
from data_pipelines.inputs.records import CsvRows, ParquetRows, describe_record, read_records
from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import PART_SIZE, Record, iterate_records
from data_pipelines.sources.common.layouts import hint_at_source
from data_pipelines.sources.common.samples import make_exchange, make_sample, try_record
from data_pipelines.sources.messages import read_uri

MISSING = ("", "nan", "NaN", "null", "NULL", "None", "<NA>")
"""How a missing text is written into CSV and TSV."""


class Captions:
    """One sample per picture; each of its texts is an independent annotation.

    A text that is null, NaN or blank is left out and counted. `images` is the folder that paths start from; without it
    that of `file`. With `question_column` a row is a question and its answer, else every text answers `question`, which
    may be "". `limit` takes the first rows.

    Raises `DataError` for a file without such columns; the message names what it has.
    """

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        question_column: str | None = None,
        question: str = "",
        name: str = "captions",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        if question and question_column is not None:
            raise DataError(f"question={question!r} and question_column={question_column}: give one of them")
        self.name, self.license, self.split, self.question = name, license, split, question
        self.image_column, self.text_column, self.question_column = image_column, text_column, question_column
        self.rows = read_records(file)
        self._images = MediaFolder(Path(file).parent if images is None else images)
        self._missing = MISSING if isinstance(self.rows, CsvRows) else ("",)
        self._pictures = self._group_rows(range(len(self.rows))[:limit])
        self._check_columns(file)

    @property
    def parts(self) -> int:
        """Number of parts, of `PART_SIZE` pictures each."""
        return -(-len(self._pictures) // PART_SIZE)

    def read(self, part: int) -> Iterator[Record]:
        """The samples of one part; an unusable row, or text, is a `BadSample` that stands before its picture."""
        for number in range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(self._pictures))):
            annotations: list[Annotation] = []
            rows = self._pictures[number]
            for row in rows:
                found = try_record(partial(self._annotate_row, row), partial(describe_record, self.rows, row))
                if isinstance(found, BadSample):
                    yield found
                    continue
                texts, problems = found
                annotations += texts
                yield from problems
            if annotations:
                make = partial(self._make_sample, number, rows[0], annotations)
                yield try_record(make, partial(describe_record, self.rows, rows[0]))

    def __iter__(self) -> Iterator[Record]:
        return iterate_records(self)

    def _group_rows(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The rows of every picture, in order of first appearance. Rows that bring bytes stand alone."""
        groups: dict[Any, list[int]] = {}
        for number, path in zip(numbers, self._list_paths(), strict=False):
            groups.setdefault(path if path is not None else number, []).append(number)
        return list(groups.values())

    def _list_paths(self) -> Iterator[str | None]:
        """The path of every row; None for one that holds bytes, or cannot be read."""
        if isinstance(self.rows, ParquetRows):
            column = self.image_column
            schema = open_parquet(self.rows.path).schema_arrow
            kind = str(schema.field(column).type) if column in schema.names else ""
            if "string" in kind and not kind.startswith("struct"):
                yield from (_path_of(row[column]) for row in parquet_rows(self.rows.path, [column]))
            else:
                yield from (None for _ in range(len(self.rows)))
            return
        for number in range(len(self.rows)):
            try:
                row = self.rows[number]
            except BadSample:
                row = None
            yield _path_of(row.get(self.image_column)) if isinstance(row, Mapping) else None

    def _check_columns(self, file: str) -> None:
        """Raise `DataError` for columns that the file, or the first of its rows that can be read, does not have."""
        known, first = self._list_columns()
        if not self._pictures:
            raise DataError(f"file: {file} holds no rows")
        if first is None:
            return  # every row says itself what is wrong with it
        wanted = {"image_column": self.image_column, "text_column": self.text_column}
        if self.question_column is not None:
            wanted["question_column"] = self.question_column
        lacking = [f"{option}={name}" for option, name in wanted.items() if name not in known]
        if lacking:
            hint = hint_at_source(first) or (
                "; its columns seem to be separated by ';' or tabs: save it with commas, or as .tsv"
                if len(known) == 1 and {";", "\t"} & {*str(known[0])}
                else ""
            )
            raise DataError(f"{', '.join(lacking)}: {file} has no such column; it has {', '.join(known)}{hint}")

    def _list_columns(self) -> tuple[list[str], Mapping[str, Any] | None]:
        """The names of the columns, of JSON those of the first hundred rows; and a row to judge the layout by."""
        if isinstance(self.rows, ParquetRows):
            columns = open_parquet(self.rows.path).schema_arrow.names
            return columns, dict.fromkeys(columns, "")
        if isinstance(self.rows, CsvRows):
            return self.rows.fields, dict.fromkeys(self.rows.fields, "")
        known: dict[str, Any] = {}
        for number in range(min(100, len(self.rows))):
            try:
                row = self.rows[number]
            except BadSample:
                continue
            known |= {str(name): value for name, value in row.items()} if isinstance(row, Mapping) else {}
        return list(known), known or None

    def _annotate_row(self, number: int) -> tuple[list[Annotation], list[BadSample]]:
        """What one row says of its picture: annotations, and the texts that are left out."""
        row = self.rows[number]
        if not isinstance(row, Mapping):
            raise BadSample(f"holds a {type(row).__name__}, not an object")
        ask = self.question
        if self.question_column is not None:
            ask = self._require_text(row.get(self.question_column), self.question_column)
        value = row.get(self.text_column)
        if value is None and (hint := hint_at_source(row, ("captions",))):
            raise BadSample(f"has no {self.text_column}{hint}")
        texts, problems = [], []
        for one in (value or [None]) if isinstance(value, list) else [value]:
            try:
                text = self._require_text(one, self.text_column)
                texts.append(make_exchange(ask, text) if ask else caption_annotation(text))
            except BadSample as error:
                where = describe_record(self.rows, number)
                problems.append(BadSample(f"{where}: {error}", kind=error.kind))
        return texts, problems

    def _require_text(self, value: Any, column: str) -> str:
        """A text, or a whole number such as a class, without outer blanks. Raises `BadSample`."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            value = ""
        if not isinstance(value, str):
            raise BadSample(f"{column} is {value!r:.80}; expected text")
        if value.strip() in self._missing:
            raise BadSample(f"{column} is missing: {value!r}", kind=EMPTY)
        return value.strip()

    def _make_sample(self, number: int, row: int, annotations: Sequence[Annotation]) -> tuple[Sample, list[bytes]]:
        record = self.rows[row]
        value = record.get(self.image_column)
        path = _path_of(value) or (value.get("path") if isinstance(value, Mapping) else None)
        own = record.get("id", record.get("key")) if path is None else Path(str(path)).stem
        meta = {"id": record["id"]} if isinstance(record.get("id"), str | int) else {}
        key = f"{number:07d}" if own is None else f"{number:07d}-{own}"
        if path is not None:
            meta["images"] = [str(path)]
        return make_sample(self, key, [self._read_image(value)], annotations, meta)

    def _read_image(self, value: Any) -> bytes:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or value.strip() in self._missing:
            raise BadSample(f"{self.image_column} is {value!r:.80}; expected a path, a data URI or bytes")
        if value.startswith("data:"):
            return read_uri(value)
        if "://" in value:
            raise BadSample(f"{self.image_column} is the address {value!r:.80}; download it (img2dataset does)")
        return self._images.read(value)


def _path_of(value: Any) -> str | None:
    return value if isinstance(value, str) and value and not value.startswith("data:") else None
