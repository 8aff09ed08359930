"""The index of a shard set: where every sample lies, and what is known of its media."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import DataError
from data_pipelines.sample import Sample
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.members import Member
from data_pipelines.shards.mmap_arrays import UNREADABLE, map_arrays

INDEX = "index.npz"


MAX_KEY = 80  # bytes, as `members.KEY` allows


SCANNED = 2**20  # samples that are looked at together


PER_MEMBER = {"name": "i", "offset": "q", "size": "q", "crc": "q"}


PER_MEDIA = {"width": "i", "height": "i", "frames": "i", "seconds": "d"}


class IndexEntry(NamedTuple):
    """One sample of an index: its key, its shard's number, its members in file order, and where its media items are in
    width, height, frames and seconds."""

    key: str
    shard: int
    members: list[Member]
    media: slice


class Index:
    """N samples with M members and K media items, as flat arrays.

    shard, annotations [N]; member_start, media_start, key_start [N + 1]; name, offset, size, crc [M];
    width, height, frames, seconds [K]. `names` are the distinct member names. What the numbers say is not believed:
    those that lead outside the arrays, or to no shard of `shards` (None: not known), raise `DataError`; those that lead
    outside a shard are its reader's to check.
    """

    def __init__(self, arrays: dict[str, np.ndarray], shards: int | None = None) -> None:
        self.shard = arrays["shard"]
        self.annotations = arrays["annotations"]
        self.member_start = arrays["member_start"]
        self.media_start = arrays["media_start"]
        self.width, self.height = arrays["width"], arrays["height"]
        self.frames, self.seconds = arrays["frames"], arrays["seconds"]
        self.names: list[str] = json.loads(arrays["names"].tobytes())
        self._members = [arrays[name] for name in PER_MEMBER]
        self._key_start, self._keys = arrays["key_start"], arrays["keys"]
        self._shards = shards
        self._check_arrays()

    def __len__(self) -> int:
        return len(self.shard)

    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        lengths, text = np.diff(self._key_start), self._keys.tobytes()
        if (self._key_start < 0).any() or not ((lengths > 0) & (lengths <= MAX_KEY)).all() or not text.isascii():
            raise DataError(f"the index is damaged: its keys are not all of 1 to {MAX_KEY} ASCII characters")
        return [text[start:stop].decode("ascii") for start, stop in pairwise(self._key_start.tolist())]

    def locate_sample(self, i: int) -> IndexEntry:
        """All that the index says of sample i. Raises `IndexError` if there is none."""
        if not 0 <= i < len(self.shard):
            raise IndexError(f"sample {i} of {len(self.shard)}")
        spans = []
        for starts, values in (
            (self.media_start, self.width),
            (self._key_start, self._keys),
            (self.member_start, self._members[0]),
        ):
            start, stop = starts[i : i + 2].tolist()
            if not 0 <= start <= stop <= len(values):
                raise DataError(f"the index is damaged: sample {i} is at {start} to {stop} of {len(values)}")
            spans.append(slice(start, stop))
        media, letters, rows = spans
        key = self._keys[letters].tobytes()
        if not key or len(key) > MAX_KEY or not key.isascii():
            raise DataError(f"the index is damaged: the key of sample {i} has {len(key)} bytes")
        shard = int(self.shard[i])
        if shard < 0 or (self._shards is not None and shard >= self._shards):
            raise DataError(f"the index is damaged: it puts sample {i} into shard {shard} of {self._shards}")
        names, *columns = (column[rows].tolist() for column in self._members)
        if names and not 0 <= min(names) <= max(names) < len(self.names):
            raise DataError(f"the index is damaged: member names {names} of sample {i}, it has {len(self.names)}")
        members = [Member(self.names[name], *row) for name, *row in zip(names, *columns)]
        return IndexEntry(key.decode("ascii"), shard, members, media)

    def find_shard(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(self.shard[i])

    def find_runs(self) -> np.ndarray:
        """`[runs]` int64, the first sample of every stretch that lies in one shard, in constant memory."""
        found = [np.zeros(min(len(self), 1), np.int64)]
        for first in range(0, len(self), SCANNED):
            found.append(np.flatnonzero(np.diff(self.shard[first : first + SCANNED + 1])) + first + 1)
        return np.concatenate(found)

    def read_media(self, i: int) -> list[tuple[int, int, int, float]]:
        """Width, height, frames and seconds of each media item of sample i."""
        span = self.locate_sample(i).media
        columns = (self.width[span], self.height[span], self.frames[span], self.seconds[span])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def count_annotations(self, i: int) -> int:
        """Number of annotations of sample i."""
        return int(self.annotations[i])

    def _check_arrays(self) -> None:
        """The arrays fit together: lengths, and the ends of what they point to."""
        samples = len(self.shard)
        media = (self.width, self.height, self.frames, self.seconds)
        fits = len(self.annotations) == samples and isinstance(self.names, list)
        for starts, columns in (
            (self.member_start, self._members),
            (self.media_start, media),
            (self._key_start, [self._keys]),
        ):
            fits = fits and len(starts) == samples + 1 and {len(column) for column in columns} == {int(starts[-1])}
        if not fits or not all(isinstance(name, str) for name in self.names):
            raise ValueError("its arrays do not fit together")

    def list_columns(self) -> list[np.ndarray]:
        """The arrays `PER_MEMBER` of all samples."""
        return self._members

    @classmethod
    def load(cls, path: Path, shards: int | None = None, *, checked: bool = False) -> Index:
        """Map the file of a set of so many `shards` into memory; `checked`: compare it with its checksums first.

        Raises `DataError` if it is missing or damaged.
        """
        try:
            return cls(map_arrays(path, checked=checked), shards)
        except UNREADABLE as error:
            raise DataError(f"{path}: not a readable index: {type(error).__name__}: {error}") from error


class IndexBuilder:
    """Collects samples in order. Raises `DataError` for a key that was there before."""

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, code in (PER_MEMBER | PER_MEDIA).items()}
        self._shard, self._annotations = array("i"), array("i")
        self._member_start, self._media_start = array("q", [0]), array("q", [0])
        self._keys: dict[str, None] = {}
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add_sample(self, shard: int, sample: Sample, members: Sequence[Member]) -> None:
        """Append a sample of shard number `shard`."""
        if sample.key in self._keys:
            raise DataError(f"duplicate key {sample.key!r}; keys must be unique in a shard set")
        self._keys[sample.key] = None
        self._shard.append(shard)
        self._annotations.append(len(sample.annotations))
        for member in members:
            name = self._names.setdefault(member.name, len(self._names))
            for column, value in zip(PER_MEMBER, (name, member.offset, member.size, member.crc), strict=True):
                self._columns[column].append(value)
        for item in sample.media:
            for column in PER_MEDIA:
                self._columns[column].append(getattr(item, column))
        self._member_start.append(len(self._columns["name"]))
        self._media_start.append(len(self._columns["width"]))

    def add_index(self, index: Index, shards: Sequence[int], rows: np.ndarray | None = None) -> None:
        """Append the samples `rows` of another index, or all; its shard number s is number `shards[s]` here."""
        rows = np.arange(len(index)) if rows is None else rows
        keys = index.keys()
        for i in rows.tolist():
            if (key := keys[i]) in self._keys:
                raise DataError(f"duplicate key {key!r}; keys must be unique in a shard set")
            self._keys[key] = None
        names = [self._names.setdefault(name, len(self._names)) for name in index.names]
        members, counts = _ragged_positions(index.member_start, rows)
        for column, values in zip(PER_MEMBER, index.list_columns(), strict=True):
            values = np.array(names, dtype=np.int64)[values[members]] if column == "name" else values[members]
            _append_values(self._columns[column], values)
        _append_values(self._member_start, self._member_start[-1] + np.cumsum(counts))
        media, counts = _ragged_positions(index.media_start, rows)
        for column in PER_MEDIA:
            _append_values(self._columns[column], getattr(index, column)[media])
        _append_values(self._media_start, self._media_start[-1] + np.cumsum(counts))
        _append_values(self._shard, np.array(shards, dtype=np.int64)[index.shard[rows]])
        _append_values(self._annotations, index.annotations[rows])

    def write_file(self, path: Path) -> FileInfo:
        """Write the index; the same samples give the same bytes."""
        keys = list(self._keys)
        lengths = np.fromiter((len(key) for key in keys), dtype=np.int64, count=len(keys))
        arrays: dict[str, Any] = {name: np.array(column) for name, column in self._columns.items()}
        arrays |= {"shard": np.array(self._shard), "annotations": np.array(self._annotations)}
        arrays |= {"member_start": np.array(self._member_start), "media_start": np.array(self._media_start)}
        arrays["key_start"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        arrays["keys"] = np.frombuffer("".join(keys).encode("ascii"), dtype=np.uint8)
        arrays["names"] = np.frombuffer(json.dumps(list(self._names)).encode(), dtype=np.uint8)
        with atomic_write(path, "wb") as file:  # readers have the old one mapped
            np.savez(file, **arrays)
        data = path.read_bytes()
        return FileInfo(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _ragged_positions(start: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions that belong to `rows` of a ragged array, one after another, and how many each row has."""
    counts = start[rows + 1] - start[rows]
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]])[: len(rows)]
    return np.repeat(start[rows] - first, counts) + np.arange(counts.sum()), counts


def _append_values(column: array[Any], values: np.ndarray) -> None:
    column.frombytes(values.astype(column.typecode).tobytes())
