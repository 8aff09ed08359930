"""Columns: what a model says of the samples of a shard set, in files beside it. The shards are never touched.

A folder of JSON Lines, one file a shard with a line a sample: its key and its value in every column, a list where there
is one for each annotation. `columns.json`, written last, says of which set and by what, and has the hash of every file.
Samples that could not be used have no line.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.records import JsonLines
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.shard_set import ShardSet

COLUMNS = "columns.json"
PLAN = "plan.json"
KEY = "key"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsManifest:
    """Complete columns: of the set with the fingerprint `set`, made by `about`; `files` are those of its shards."""

    set: str
    names: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileInfo, ...] = ()
    version: int = VERSION


class ColumnWriter:
    """Writes columns shard by shard into `folder`; what an interrupted one with the same arguments wrote is kept.

    Args:
        names: of the columns.
        about: what the values depend on, besides the set.

    Raises:
        DataError: the folder holds complete columns that were made with other arguments, or something else.
    """

    def __init__(self, folder: Path | str, shards: ShardSet, names: Sequence[str], about: Mapping[str, Any]) -> None:
        self.folder, self.shards = Path(folder), shards
        made = ColumnsManifest(set=shards.fingerprint, names=tuple(names), about=json.loads(json.dumps(about)))
        self._plan = asdict(made)
        self.complete = (self.folder / COLUMNS).is_file()
        if self.complete:
            self._check_same(asdict(read_manifest(self.folder)))
        else:
            self._open_folder()

    @property
    def missing_shards(self) -> list[int]:
        """Numbers of the shards whose columns are to be written."""
        numbers = range(len(self.shards.manifest.shards))
        return [] if self.complete else [n for n in numbers if not (self.folder / file_name(n)).is_file()]

    def write_rows(self, shard: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a shard; the file is whole when it is there.

        Raises:
            DataError: a row has other columns, or a value that JSON cannot hold.
        """
        expected = {KEY, *self._plan["names"]}
        for row in rows:
            if set(row) != expected:
                raise DataError(f"{self.folder}: a row has {sorted(row)}; expected {sorted(expected)}")
        try:
            text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            _write_file(self.folder / file_name(shard), text.encode())
        except ValueError as error:
            raise DataError(f"{self.folder}: shard {shard} has a value that is not JSON in UTF-8: {error}") from error

    def write_manifest(self) -> None:
        """Hash all files and write `columns.json`."""
        if self.complete:
            return
        infos = []
        for number in range(len(self.shards.manifest.shards)):
            data = (self.folder / file_name(number)).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            name, lines = file_name(number), data.count(b"\n")
            infos.append(asdict(FileInfo(name=name, bytes=len(data), sha256=digest, samples=lines)))
        _write_file(self.folder / COLUMNS, json.dumps(self._plan | {"files": infos}, indent=1).encode())
        (self.folder / PLAN).unlink(missing_ok=True)
        self.complete = True

    def _open_folder(self) -> None:
        """Take up the folder if it was begun with the same plan, else begin it."""
        plan = self.folder / PLAN
        try:
            found = json.loads(plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found == json.loads(json.dumps(self._plan)):
            return
        seen = [path for path in self.folder.glob("*") if not path.name.startswith(".")]  # others begin it just now
        if found is None and seen:
            raise DataError(f"{self.folder} exists and holds no columns; choose another output or remove it")
        if found is not None:
            print(f"{self.folder}: unfinished columns with other arguments are deleted", file=sys.stderr)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_file(plan, json.dumps(self._plan).encode())

    def _check_same(self, found: Mapping[str, Any]) -> None:
        now, there = (_flatten({**one, "files": ()}) for one in (self._plan, found))
        differing = [f"{n}: {there.get(n)!r} there, {now.get(n)!r} now" for n in sorted(now.keys() | there.keys())
                     if now.get(n) != there.get(n)]  # fmt: skip
        if differing:
            raise DataError(
                f"{self.folder} holds columns made with other arguments ({'; '.join(differing)}); choose another "
                "output or remove it"
            )


class Columns:
    """The complete columns in `folder`, of the set `shards`.

    Raises:
        DataError: there are none, they lack one of `names`, or they are of another set.
    """

    def __init__(self, folder: Path | str, shards: ShardSet, names: Sequence[str] = (), *, option: str) -> None:
        self.folder, self._shards = Path(folder), shards
        self.manifest = read_manifest(self.folder, option)
        if missing := [name for name in names if name not in self.manifest.names]:
            known = ", ".join(self.manifest.names)
            raise DataError(f"{option}: {folder} has no column {', '.join(missing)}; its columns: {known}")
        if self.manifest.set != shards.fingerprint or len(self.manifest.files) != len(shards.manifest.shards):
            raise DataError(
                f"{option}: {folder} is of another shard set than {shards.address}; make it again for this one"
            )
        self._held: tuple[int, dict[str, Any]] = (-1, {})

    @property
    def sha256(self) -> str:
        """Hash of `columns.json`, hence of everything."""
        return hashlib.sha256((self.folder / COLUMNS).read_bytes()).hexdigest()

    def read_row(self, i: int) -> Mapping[str, Any]:
        """The columns of sample i of the set; empty if it has no line. One shard is held: ask in order."""
        shard = self._shards.index.find_shard(i)
        if self._held[0] != shard:
            self._held = (shard, self._load_shard(self.manifest.files[shard]))
        return self._held[1].get(self._shards.key(i), {})

    def load_numbers(self, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Columns with one number a sample, `[samples]`; not a number where a sample has no line.

        Raises:
            DataError: a value is no number.
        """
        numbers = {name: np.full(len(self._shards), np.nan, np.float32) for name in names}
        for i in range(len(self._shards)):
            row = self.read_row(i)
            for name in names if row else ():
                value = row.get(name)
                if not isinstance(value, int | float) or isinstance(value, bool):
                    raise DataError(f"{self.folder}: key {row[KEY]!r}: column {name!r} is {value!r}; expected a number")
                numbers[name][i] = value
        return numbers

    def _load_shard(self, info: FileInfo) -> dict[str, Any]:
        path, rows = self.folder / info.name, {}
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if digest != info.sha256:
            raise DataError(f"{path}: sha256 {digest[:12]}, {COLUMNS} says {info.sha256[:12]}; make the columns again")
        lines = JsonLines(path)
        for i in range(len(lines)):
            try:
                row = lines[i]
            except BadSample as error:
                raise DataError(f"{path}, line {lines.line_number(i)}: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
                raise DataError(f"{path}, line {lines.line_number(i)}: expected an object with a text {KEY!r}")
            rows[row[KEY]] = row
        return rows


def read_manifest(folder: Path, option: str = "columns") -> ColumnsManifest:
    """`columns.json` of a folder. Raises `DataError` if it is not there or malformed."""
    path = folder / COLUMNS
    if not path.is_file():
        begun = " (it is unfinished: the command that started it finishes it)" if (folder / PLAN).is_file() else ""
        raise DataError(f"{option}: {folder} has no {COLUMNS}{begun}; expected what mode=caption or mode=score writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise DataError(
                f"{path}: version {data['version']!r}, this program reads {VERSION}; make the columns again"
            )
        files = tuple(FileInfo(**info) for info in data.pop("files"))
        if any(info.name != file_name(number) for number, info in enumerate(files)):
            raise ValueError("file names are not those of shards")
        return ColumnsManifest(**{**data, "names": tuple(data["names"]), "files": files})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: malformed: {type(error).__name__}: {error}") from error


def file_name(shard: int) -> str:
    """The file of the columns of shard number `shard`."""
    return f"shard-{shard:06d}.jsonl"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, tuples as lists."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": json.loads(json.dumps(value))}
    return flat


def _write_file(path: Path, data: bytes) -> None:
    with atomic_write(path, "wb", sync=True) as file:
        file.write(data)
