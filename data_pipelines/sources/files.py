"""What sources read from disk: JSON, JSON Lines, YAML, image folders. Paths and contents are untrusted."""

from __future__ import annotations

import importlib
import json
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import yaml  # type: ignore[import-untyped]

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media import MAX_BYTES

MAX_LINE = 2 * MAX_BYTES
"""Bytes of a line of JSON Lines: room for the largest image in base64."""

_PIECE = 2**20
_ROWS = 64


class ImageFolder:
    """The folder that the image paths of records start from; with `None`, every path is a `BadSample`."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path is not None else None
        if self.path is not None and not self.path.is_dir():
            raise DataError(f"images: no such folder: {self.path}")

    def read(self, path: str) -> bytes:
        """The bytes of one file of the folder. Raises `BadSample`."""
        if self.path is None:
            raise BadSample(f"names image {path!r}, but no folder was given (images=<folder>)")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise BadSample(f"image path {path!r} leaves the image folder")
        try:
            status = (self.path / path).stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(f"image {self.path / path} is not a file")
            if status.st_size > MAX_BYTES:
                raise BadSample(f"image {self.path / path} has {status.st_size} bytes; at most {MAX_BYTES} are read")
            return (self.path / path).read_bytes()
        except OSError as error:
            raise BadSample(f"image {self.path / path}: {error.strerror}") from error


class JsonLines(Sequence[Any]):
    """The values of a JSON Lines file, parsed when asked for; blank lines do not count.

    Only the places of the lines are held in memory. Item access raises `BadSample` for a line that is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines, self._starts, self._ends = array("q"), array("q"), array("q")
        try:
            with open(path, "rb") as file:
                for line, start, end in _lines(file.readline):
                    self._lines.append(line)
                    self._starts.append(start)
                    self._ends.append(end)
        except OSError as error:
            raise DataError(f"file: {path}: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, i: int) -> int:
        """The line number of value i, from 1."""
        return self._lines[i]

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start, end = self._starts[i], self._ends[i]
        if end - start > MAX_LINE:
            raise BadSample(f"line of {end - start} bytes; at most {MAX_LINE} are read")
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse_json(file.read(end - start))


def _lines(readline: Any) -> Iterator[tuple[int, int, int]]:
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


def parse_json(data: bytes | str) -> Any:
    """The value of JSON text. Raises `BadSample`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON: {error}") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises `DataError`."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"file: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"file: {path} is not JSON: {error}") from error


def read_records(path: Path) -> Sequence[Any]:
    """The records of a JSON Lines file (.jsonl, .ndjson), or of a JSON file that holds a list. Raises `DataError`."""
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"file: {path} holds a {type(records).__name__}; expected a list of records")
    return records


def place(records: Sequence[Any], i: int) -> str:
    """What messages call record i: by its own id where it has one, by its line in JSON Lines."""
    try:
        record = records[i]
    except BadSample:
        record = None
    if isinstance(record, dict) and "id" in record:
        return f"record {record['id']!r}"
    return f"line {records.line(i)}" if isinstance(records, JsonLines) else f"record {i}"


def read_yaml(path: Path) -> Any:
    """The value of a YAML file without tags that make objects. Raises `DataError`."""
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DataError(f"file: {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"file: {path} is not YAML: {error}") from error


def find_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of `folder` with one of the `suffixes`, sorted by name. Raises `DataError` if there are none."""
    if not folder.is_dir():
        raise DataError(f"folder: no such folder: {folder}")
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    if not found:
        raise DataError(f"folder: {folder} holds no {' or '.join(suffixes)} files")
    return found


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile` of `path`. Raises `DataError`."""
    parquet = needs("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def parquet_rows(path: Path, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, or of some of its row groups, few at a time in memory. Raises `DataError`."""
    try:
        for batch in open_parquet(path).iter_batches(_ROWS, row_groups=groups, columns=list(columns)):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error


def needs(module: str) -> Any:
    """Import a package of the `data` extra. Raises `DataError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} is not installed: pip install 'vlm-train[data]'") from error
