"""`ShardSet`: shards -> samples, by number. Sample i is read with one seek; the order is the caller's business."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.limits import MAX_BYTES, MAX_PIXELS
from data_pipelines.sample import MediaItem, Sample
from data_pipelines.shards.checksum import crc32
from data_pipelines.shards.index_file import Index, IndexEntry
from data_pipelines.shards.index_parts import PARTS, IndexParts
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import FileInfo, Manifest
from data_pipelines.shards.members import JSON, MAX_MEMBER, parse_json, to_sample
from data_pipelines.shards.remote import (
    CACHE_BYTES,
    Cache,
    default_cache,
    is_remote,
    join_address,
    local_path,
    read_manifest,
)

MAX_OPEN_FILES = 32
MAX_OPEN_COPIES = 8  # of remote shards: an open file keeps its disk space when the cache removes it
HASHED_INDEX = 64 * 2**20
"""Bytes up to which an index is hashed whenever it is opened; a larger one is by `verify`, and read with care."""


class ShardSet:
    """A complete shard set. Safe in threads, forked workers and when pickled.

    Raises `DataError` if the manifest, the index or a shard is missing, of another size, or disagrees.

    Args:
        folder: a folder, or the s3://, gs://, http:// or https:// address of one. Remote shards are fetched whole when
            first read, see `data_pipelines.shards.remote`.
        cache_dir, cache_bytes: where copies of remote shards are, and how many bytes of them; None:
            `$VLM_TRAIN_CACHE` or `~/.cache/vlm_train/shards`.

    Attributes:
        folder: `folder` as a path, for messages only if the set is remote.
        address: `folder` as it was given.
        fingerprint: hash of the samples and their order.
    """

    def __init__(
        self, folder: Path | str, *, cache_dir: Path | str | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._open_set(str(folder), Path(cache_dir or default_cache()), cache_bytes, None)

    def _open_set(self, address: str, cache_dir: Path, cache_bytes: int, manifest: Manifest | None) -> None:
        self.address, self.folder = address, local_path(address)
        self._cache = Cache(cache_dir, cache_bytes) if is_remote(address) else None
        if self._cache:
            self.manifest = manifest or read_manifest(address)
        else:
            self.manifest = Manifest.read(self.folder)
            self._check_files()
        self._copies = self._cache or (Cache(cache_dir, cache_bytes) if self.manifest.elsewhere else None)
        self._layout = Layout.from_json(self.manifest.layout) if self.manifest.layout else None
        self.index = self._load_index()
        if not len(self.index) == self.manifest.samples == sum(info.samples for info in self.manifest.shards):
            counts = f"{self.manifest.samples}, its shards {sum(info.samples for info in self.manifest.shards)}"
            raise DataError(f"{address}: index of {len(self.index)} samples, manifest of {counts}")
        self.fingerprint = self.manifest.fingerprint
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> tuple[Any, ...]:
        """A remote set takes its manifest along: all processes read the same set, whatever is uploaded meanwhile."""
        if not self._copies:
            return self.address, Path(), 0, None
        return self.address, self._copies.folder, self._copies.max_bytes, self.manifest if self._cache else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._open_set(*state)

    def key(self, i: int) -> str:
        """The key of sample i, without reading a shard."""
        return self.index.locate_sample(i).key

    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        return self.index.keys()

    def shard_name(self, i: int) -> str:
        """The file name of the shard that holds sample i."""
        return self.manifest.shards[self.index.locate_sample(i).shard].name

    def shard_path(self, i: int) -> str:
        """Path or address of the shard that holds sample i."""
        return self._path_of_shard(self.manifest.shards[self.index.locate_sample(i).shard])

    def describe_sample(self, i: int) -> str:
        """Shard and key of sample i as messages name them."""
        return f"{self.shard_path(i)}, key {self.key(i)!r}"

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """`[shards]` int64, the number of the first sample of each shard: reading from there on stays in one file.

        Raises `DataError` if the samples do not lie shard by shard.
        """
        ends = np.cumsum([info.samples for info in self.manifest.shards], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        if isinstance(self.index, IndexParts):
            return starts
        (held,) = np.nonzero(ends > starts)
        if (self.index.shard[starts[held]] != held).any() or (self.index.shard[ends[held] - 1] != held).any():
            raise DataError(f"{self.address}: the index does not have as many samples of each shard as the manifest")
        return starts

    def find_runs(self) -> np.ndarray:
        """`[runs]` int64, the first sample of every stretch that lies in one shard."""
        return self.index.find_runs()

    def count_media(self, i: int) -> int:
        """Number of media items of sample i, without reading a shard."""
        span = self.index.locate_sample(i).media
        return span.stop - span.start

    def media_items(self, i: int) -> list[MediaItem]:
        """Sizes of sample i's media, without reading a shard. Their names are their numbers."""
        return [
            MediaItem(
                name=str(number),
                width=width,
                height=height,
                kind="image" if frames == 1 else "video",
                frames=frames,
                seconds=seconds,
            )
            for number, (width, height, frames, seconds) in enumerate(self.index.read_media(i))
        ]

    def count_annotations(self, i: int) -> int:
        """Number of annotations of sample i, without reading a shard."""
        return self.index.count_annotations(i)

    def load_sample(self, i: int) -> tuple[Sample, list[bytes]]:
        """Sample i and the encoded bytes of its media, as they were when they were indexed.

        Raises `BadSample` naming shard and key, and `DataError` if the shard cannot be had.
        """
        entry, sizes = self.index.locate_sample(i), self.index.read_media(i)
        try:
            members = self._read_members(entry)
            sample, blobs = (self._layout.read_sample if self._layout else to_sample)(entry.key, members)
            # The index has the true sizes, and the bytes are those that were indexed: no header needs another look.
            for item, blob, (width, height, *_) in zip(sample.media, blobs, sizes, strict=True):
                if (width, height) != (item.width, item.height):
                    where = f"{item.name} is {width} x {height} pixels"
                    raise BadSample(f"{where}, its entry says {item.width} x {item.height}", kind="malformed")
                if item.kind == "image" and (width * height > MAX_PIXELS or len(blob) > MAX_BYTES):
                    found = f"{item.name} has {width} x {height} pixels, {len(blob)} bytes"
                    raise BadSample(f"{found}; at most {MAX_PIXELS} pixels, {MAX_BYTES} bytes are read", kind="image")
        except BadSample as error:
            raise self._locate_error(error, i) from error
        return sample, blobs

    def read_sample(self, i: int) -> Sample:
        """Sample i without its media, which are not read where our own JSON says what they are. Raises as `load`."""
        if self._layout:
            return self.load_sample(i)[0]
        entry = self.index.locate_sample(i)
        try:
            for _, data in self._read_members(entry, only=JSON):
                if isinstance(sample := parse_json(entry.key, data), Sample):
                    return sample
        except BadSample as error:
            raise self._locate_error(error, i) from error
        return self.load_sample(i)[0]

    def _locate_error(self, error: BadSample, i: int) -> BadSample:
        kind = "malformed" if error.kind == "other" else error.kind
        return BadSample(f"{self.describe_sample(i)}: {error}", kind=kind, shard=self.shard_path(i), key=self.key(i))

    def _read_members(self, entry: IndexEntry, only: str | None = None) -> list[tuple[str, bytes]]:
        """The files of a sample, checked against the index; `only`: the one of this name.

        Each thread keeps its own few shards open, so that none closes another's.
        """
        files: OrderedDict[int, FileIO] = self._local.__dict__.setdefault("files", OrderedDict())
        info = self.manifest.shards[entry.shard]
        if entry.shard not in files:
            if len(files) >= (MAX_OPEN_COPIES if self._copies else MAX_OPEN_FILES):
                files.popitem(last=False)[1].close()
            files[entry.shard] = self._open_file(info)
        files.move_to_end(entry.shard)
        file, found = files[entry.shard].fileno(), []
        for name, offset, size, crc in entry.members:
            if only is not None and name != only:
                continue
            if offset < 0 or not 0 <= size <= MAX_MEMBER or offset + size > info.bytes:
                raise BadSample(
                    f"member {name}: {size} bytes at {offset} of {info.bytes}, says the index", kind="corrupt"
                )
            data = os.pread(file, size, offset)
            if len(data) != size or crc32(data) != crc:
                copies = self._copies if is_remote(self._path_of_shard(info)) else None
                if copies and copies.drop_damaged(files[entry.shard], info):  # the copy is damaged, not the shard
                    files.pop(entry.shard).close()
                    return self._read_members(entry, only)
                raise BadSample(f"member {name} is corrupt (checksum differs from the index)", kind="corrupt")
            found.append((name, data))
        return found

    def __iter__(self) -> Iterator[tuple[Sample, list[bytes]]]:
        return (self.load_sample(i) for i in range(len(self)))

    def verify_hashes(self) -> None:
        """Hash the index and every shard. Raises `DataError` naming each that differs from the manifest."""
        problems = [p for info in (self.manifest.index, *self.manifest.shards) if (p := self._check_hash(info))]
        if problems:
            raise DataError("\n".join([*problems, self._rebuild_command()]))

    def _check_hash(self, info: FileInfo) -> str | None:
        with self._open_file(info) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        same = digest == info.sha256
        return (
            None if same else f"{self._path_of_shard(info)}: sha256 {digest[:12]}, the manifest says {info.sha256[:12]}"
        )

    def _load_index(self) -> Index | IndexParts:
        info, shards = self.manifest.index, len(self.manifest.shards)
        if not self._cache and info.bytes <= HASHED_INDEX and (problem := self._check_hash(info)):
            raise DataError(f"{problem}: not a readable index. {self._rebuild_command()}")
        if self._cache and info.bytes <= HASHED_INDEX:
            with self._open_file(info) as file:
                self._cache.drop_damaged(file, info)
        path = self._locate_file(info)
        if info.name == PARTS:
            return IndexParts.load(path, self._locate_file, self._rebuild_command())
        return Index.load(path, shards)

    def _locate_file(self, info: FileInfo) -> Path:
        """A file of the index on this machine."""
        if self._cache:
            return self._cache.cached_path(join_address(self.address, info.name), info)
        return self.folder / info.name

    def _check_files(self) -> None:
        problems = [p for info in (self.manifest.index, *self.manifest.shards) if (p := self._check_file(info))]
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise DataError("\n".join([*problems[:10], *more, self._rebuild_command()]))

    def _check_file(self, info: FileInfo) -> str | None:
        if self.manifest.elsewhere and is_remote(info.name):
            return None
        path = self.folder / info.name
        if not path.is_file():
            return f"{path}: missing; the manifest lists {len(self.manifest.shards)} shards"
        size = path.stat().st_size
        return None if size == info.bytes else f"{path}: {size} bytes, the manifest says {info.bytes}"

    def _rebuild_command(self) -> str:
        if self._cache:
            return f"Remove the copies in {self._cache.folder}; if that does not help, upload the set again"
        return self.manifest.describe_remedy(self.folder)

    def _path_of_shard(self, info: FileInfo) -> str:
        if self.manifest.elsewhere and is_remote(info.name):
            return info.name
        return join_address(self.address, info.name) if self._cache else str(self.folder / info.name)

    def _open_file(self, info: FileInfo) -> FileIO:
        if self._copies and is_remote(path := self._path_of_shard(info)):
            return self._copies.open_cached(path, info)
        return open(self.folder / info.name, "rb", buffering=0)
