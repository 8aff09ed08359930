"""Folders and files of raw data: media, JSON, YAML, parquet. Paths and contents are untrusted."""

from __future__ import annotations

import importlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.video import MAX_BYTES

_ROWS = 64  # of a parquet file in memory at once


class MediaFolder:
    """The folder that the image and video paths of records start from; with `None`, every path is a `BadSample`.

    `option` names the setting in messages. Raises `DataError` if the folder is not there.
    """

    def __init__(self, path: str | Path | None, option: str = "images") -> None:
        self.path, self.option = Path(path) if path is not None else None, option
        if self.path is not None and not self.path.is_dir():
            raise DataError(f"{option}: no such folder: {self.path}")

    def read(self, *names: str) -> bytes:
        """The bytes of the first of `names` that is there: paths from the folder, or whole ones into it.

        Raises `BadSample`.
        """
        if self.path is None:
            raise BadSample(f"names {names[0]!r}, but no folder was given ({self.option}=<folder>)")
        whole = Path(os.path.abspath(self.path))
        for name in names:
            if not isinstance(name, str):
                raise BadSample(f"expected a path, got {name!r:.80}")
            if not (whole / name).is_relative_to(whole) or ".." in Path(name).parts:
                raise BadSample(f"path {name!r} leaves the folder {self.path}")
        path = self.path / names[0]
        try:
            path = next((self.path / name for name in names if (self.path / name).is_file()), path)
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(f"{path} is not a file")
            if status.st_size > MAX_BYTES:
                raise BadSample(f"{path} has {status.st_size} bytes; at most {MAX_BYTES} are read")
            return path.read_bytes()
        except OSError as error:
            raise BadSample(f"{path}: {error.strerror}") from error
        except ValueError as error:  # a null character
            raise BadSample(f"path {str(path)!r}: {error}") from error


def parse_json(data: bytes | str) -> Any:
    """The value of JSON text. Raises `BadSample`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON: {error}") from error


def read_json(path: str | Path, option: str = "file") -> Any:
    """The value of a JSON file. Raises `DataError` that names the option."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{option}: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option}: {path} is not JSON: {error}") from error


def read_list(path: str | Path, option: str = "file", field: str | None = None) -> list[Any]:
    """The list in a JSON file, or in one field of it. Raises `DataError`."""
    data = read_json(path, option)
    records = data.get(field) if field is not None and isinstance(data, dict) else data
    if not isinstance(records, list):
        there = f" under {field!r}" if field else " of records"
        raise DataError(f"{option}: {path} holds a {type(records).__name__}; expected a list{there}")
    return records


def read_yaml(path: str | Path, option: str = "file") -> Any:
    """The value of a YAML file without tags that make objects. Raises `DataError`."""
    try:
        return yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{option}: {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{option}: {path} is not YAML: {error}") from error


def find_files(folder: str | Path, *suffixes: str) -> list[Path]:
    """The files of a folder that end in one of `suffixes`, by name. Raises `DataError` if there are none."""
    if not Path(folder).is_dir():
        raise DataError(f"folder: no such folder: {folder}")
    found = sorted(path for path in Path(folder).iterdir() if path.name.endswith(suffixes) and path.is_file())
    if not found:
        raise DataError(f"folder: {folder} holds no {' or '.join(suffixes)} files")
    return found


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile` of `path`. Raises `DataError`."""
    parquet = require_module("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def parquet_rows(
    path: Path, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, or of some of its row groups, few at a time in memory. Raises `DataError`."""
    try:
        for batch in open_parquet(path).iter_batches(_ROWS, row_groups=groups, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error


def require_module(module: str) -> Any:
    """Import a module of a package of the `data` extra. Raises `DataError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{package} is not installed: pip install 'vlm-train[data]'") from error
