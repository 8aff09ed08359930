"""The records of one file (JSON, JSON Lines, CSV, TSV, parquet) as a sequence. What is in it is untrusted."""

from __future__ import annotations

import csv
import io
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import open_parquet, parquet_rows, parse_json, read_list
from data_pipelines.media.limits import MAX_BYTES

MAX_LINE = 2 * MAX_BYTES
"""Bytes of a line of JSON Lines: room for the largest image in base64."""

_PIECE = 2**20


class Records(Sequence[Any]):
    """Raw records that are read when asked for. Item access raises `BadSample` for one that does not parse."""

    @abstractmethod
    def get(self, i: int) -> Any:
        """Record i, from 0."""

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        numbers = range(len(self))[i]
        return self.get(numbers) if isinstance(numbers, int) else [self.get(number) for number in numbers]


class JsonLines(Records):
    """The values of a JSON Lines file; blank lines do not count. Only the places of the lines are held in memory."""

    def __init__(self, path: Path, option: str = "file") -> None:
        self.path = path
        self._lines, self._starts, self._ends = array("q"), array("q"), array("q")
        try:
            with open(path, "rb") as file:
                for line, start, end in _find_lines(file.readline):
                    self._lines.append(line)
                    self._starts.append(start)
                    self._ends.append(end)
        except OSError as error:
            raise DataError(f"{option}: {path}: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def line_number(self, i: int) -> int:
        """The line number of value i, from 1."""
        return self._lines[i]

    def get(self, i: int) -> Any:
        """Record i: the value of line i."""
        start, end = self._starts[i], self._ends[i]
        if end - start > MAX_LINE:
            raise BadSample(f"line of {end - start} bytes; at most {MAX_LINE} are read")
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse_json(file.read(end - start))


class ParquetRows(Records):
    """The rows of a parquet file. The last row group asked for is held in memory: read them in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = open_parquet(path)
        groups = range(file.num_row_groups)
        self._ends = list(accumulate(file.metadata.row_group(group).num_rows for group in groups))
        self._held: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (-1, [])}

    def get(self, i: int) -> Any:
        """Record i: row i of the table."""
        group = bisect_right(self._ends, i)
        if self._held[0] != group:
            self._held = (group, list(parquet_rows(self.path, groups=[group])))
        return self._held[1][i - (self._ends[group - 1] if group else 0)]


class CsvRows(Records):
    """The rows of a CSV or TSV file with a header. Raises `DataError` for one whose quotes do not match."""

    def __init__(self, path: Path, option: str = "file", delimiter: str = ",") -> None:
        self._lines = array("q")
        self._rows: list[dict[str | None, Any]] = []
        line = 1
        try:
            text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            for row in reader:
                self._lines.append(line := reader.line_num)
                self._rows.append(row)
            self.fields = [str(name) for name in reader.fieldnames or ()]
        except OSError as error:
            raise DataError(f"{option}: {path}: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{option}: {path} is not {'CSV' if delimiter == ',' else 'TSV'}: after line {line}: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def line_number(self, i: int) -> int:
        """The number of the line where row i ends, from 1."""
        return self._lines[i]

    def get(self, i: int) -> Any:
        """Record i: row i as column -> text. A row with more values than the header has columns is a `BadSample`: a
        text with a comma that is not in quotes would be cut there."""
        row = self._rows[i]
        if None in row:
            count = len(self.fields) + len(row[None])
            raise BadSample(f"has {count} values, the header names {len(self.fields)}; are its texts in quotes?")
        return row


def _find_lines(readline: Callable[[int], bytes]) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of every line that is not blank; a long line is never in memory as a whole."""
    number, start, position, blank = 1, 0, 0, True
    while piece := readline(_PIECE):
        position += len(piece)
        blank = blank and piece.isspace()
        if piece.endswith(b"\n"):
            if not blank:
                yield number, start, position
            number, start, blank = number + 1, position, True
    if not blank:
        yield number, start, position


READERS: dict[str, Callable[[Path, str], Sequence[Any]]] = {
    ".json": read_list,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": CsvRows,
    ".tsv": lambda path, option: CsvRows(path, option, "\t"),
    ".parquet": lambda path, option: ParquetRows(path),
}


def read_records(path: str | Path, option: str = "file") -> Sequence[Any]:
    """The records of a JSON list, JSON Lines, a CSV or TSV file with a header, or parquet. Raises `DataError`."""
    path = Path(path)
    if path.suffix not in READERS:
        raise DataError(f"{option}: {path}; allowed: {', '.join(READERS)}")
    return READERS[path.suffix](path, option)


def describe_record(records: Sequence[Any], i: int) -> str:
    """What messages call record i: by its own id where it has one, by its line in a file of lines."""
    try:
        record = records[i]
    except BadSample:
        record = None
    if isinstance(record, dict) and "id" in record:
        return f"record {record['id']!r}"
    return f"line {records.line_number(i)}" if isinstance(records, JsonLines | CsvRows) else f"record {i}"
