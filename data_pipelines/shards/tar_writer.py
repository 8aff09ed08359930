"""`ShardWriter`: samples -> WebDataset tars with index and manifest. The same samples give the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.limits import check_media
from data_pipelines.sample import Sample
from data_pipelines.shards.checksum import crc32
from data_pipelines.shards.index_file import INDEX, IndexBuilder
from data_pipelines.shards.manifest import FileInfo, Manifest
from data_pipelines.shards.members import BLOCK, JSON, KEY, MEDIA, Member, member_extension
from data_pipelines.shards.partial import Partial
from data_pipelines.shards.stats import Stats, measure_lengths

SAMPLES_PER_SHARD = 1000
MAX_SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Writes a shard set into a hidden folder beside `folder`, which takes its name when the set is complete.

    Use it as a context manager: leaving it without an error finishes the set, leaving it with one removes what was
    written. `max_bytes` bounds one shard. Raises `DataError` if `folder` exists, unless `overwrite` and it holds a
    shard set, and if another process is writing it.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        source: str = "",
        license: str = "",
        split: str = "",
        build: Mapping[str, Any] | None = None,
        samples_per_shard: int = SAMPLES_PER_SHARD,
        max_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.about: dict[str, Any] = {"source": source, "license": license, "split": split, "build": dict(build or {})}
        self._hidden = Partial(folder, overwrite=overwrite)
        self.folder, self.partial = self._hidden.folder, self._hidden.path
        try:
            self._hidden.remove_matching()
            self._shards = Shards(self.partial, samples_per_shard=samples_per_shard, max_bytes=max_bytes)
        except BaseException:
            self._hidden.remove_folder()
            raise

    def write_sample(self, sample: Sample, blobs: Sequence[bytes]) -> None:
        """Append a sample with the bytes of its media. Raises `BadSample`, and then nothing of it is written."""
        self._shards.write_sample(sample, blobs)

    def publish_set(self) -> Manifest:
        """Write index and manifest and give the folder its name. Raises `DataError` if there are no samples."""
        shards = self._shards
        if not len(shards.index):
            raise DataError(f"{self.folder}: the source gave no usable sample")
        manifest = Manifest(
            samples=len(shards.index),
            shards=shards.close_last_tar(),
            index=shards.index.write_file(self.partial / INDEX),
            stats=shards.stats.to_json(),
            **self.about,
        )
        manifest.write(self.partial)
        self._hidden.publish_folder()
        return manifest

    def remove_written(self) -> None:
        """Remove the hidden folder with all that was written."""
        self._shards.close_unfinished()
        self._hidden.remove_folder()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.remove_written()
            return
        try:
            self.publish_set()
        except BaseException:
            self.remove_written()
            raise


class Shards:
    """Tars `shard-<number>.tar` in `folder`, with the `index` and `stats` of what is in them."""

    def __init__(self, folder: Path, *, samples_per_shard: int, max_bytes: int) -> None:
        if samples_per_shard < 1 or max_bytes < 1:
            raise DataError(f"samples_per_shard {samples_per_shard} and max_bytes {max_bytes} must be positive")
        self._folder, self._samples_per_shard, self._max_bytes = folder, samples_per_shard, max_bytes
        self._done: list[FileInfo] = []
        self._shard: _Shard | None = None
        self.index, self.stats = IndexBuilder(), Stats()

    def write_sample(self, sample: Sample, blobs: Sequence[bytes]) -> None:
        """Append a sample with the bytes of its media. Raises `BadSample`, and then nothing of it is written."""
        _check_sample(sample, blobs)
        if sample.key in self.index:
            raise BadSample(f"sample {sample.key!r}: duplicate key")
        text = json.dumps(sample.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
        parts = [(JSON, text), *((item.name, blob) for item, blob in zip(sample.media, blobs, strict=True))]
        size = sum(BLOCK + _padded_size(len(data)) for _, data in parts)
        if self._shard and (
            self._shard.samples >= self._samples_per_shard or self._shard.size + size > self._max_bytes
        ):
            self._close_shard()
        if self._shard is None:
            self._shard = _Shard(self._folder / shard_name(len(self._done)))
        members = [self._shard.add_member(sample.key, name, data) for name, data in parts]
        self._shard.samples += 1
        self.index.add_sample(len(self._done), sample, members)
        self.stats.add_lengths(measure_lengths(sample, blobs))

    def close_last_tar(self) -> tuple[FileInfo, ...]:
        """Complete the last tar; returns all of them."""
        self._close_shard()
        return tuple(self._done)

    def close_unfinished(self) -> None:
        """Close the file being written."""
        if self._shard:
            with contextlib.suppress(OSError):  # a full disk refuses what was still to be written
                self._shard.file.close()

    def _close_shard(self) -> None:
        if self._shard:
            self._done.append(self._shard.close_tar())
            self._shard = None


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:06d}.tar"


class _Shard:
    """One tar being written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self.samples = self.size = 0
        self._hash = hashlib.sha256()

    def add_member(self, key: str, name: str, data: bytes) -> Member:
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode = len(data), 0o644
        self._write_bytes(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write_bytes(data + bytes(_padded_size(len(data)) - len(data)))
        return Member(name, offset, len(data), crc32(data))

    def close_tar(self) -> FileInfo:
        self._write_bytes(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = self._hash.hexdigest()
        return FileInfo(name=self.path.name, bytes=self.size, sha256=digest, samples=self.samples)

    def _write_bytes(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += len(data)


def _padded_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_sample(sample: Sample, blobs: Sequence[bytes]) -> None:
    where = f"sample {sample.key!r}"
    if not KEY.fullmatch(sample.key):
        raise BadSample(f"{where}: a key has 1 to 80 of the characters A-Z a-z 0-9 _ -; see members.safe_key")
    if len(blobs) != len(sample.media):
        raise BadSample(f"{where}: {len(blobs)} media files for {len(sample.media)} media items")
    names = [item.name for item in sample.media]
    if len(set(names)) != len(names) or any(len(name) > 16 or member_extension(name) not in MEDIA for name in names):
        raise BadSample(f"{where}: media names {names}; each must differ and end in {', '.join(MEDIA)}")
    for item, blob in zip(sample.media, blobs, strict=True):
        try:
            check_media(item, blob)
        except BadSample as error:
            raise BadSample(f"{where}: {error}") from error
