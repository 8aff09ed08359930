"""`ShardSet`: shards -> samples, by number. Sample i is read with one seek; the order is the caller's business."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import Index
from data_pipelines.manifest import FileInfo, Manifest
from data_pipelines.media import check_image
from data_pipelines.members import to_sample
from data_pipelines.sample import MediaItem, Sample

MAX_OPEN_FILES = 32


class ShardSet:
    """A complete shard set. Safe in threads, forked workers and when pickled.

    Raises `DataError` if the manifest, the index or a shard is missing, of another size, or disagrees.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._check_files()
        self.index = Index.load(self.folder / self.manifest.index.name)
        if len(self.index) != self.manifest.samples:
            raise DataError(f"{self.folder}: index of {len(self.index)} samples, manifest of {self.manifest.samples}")
        self.fingerprint = self.manifest.fingerprint
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[type[ShardSet], tuple[Path]]:
        return ShardSet, (self.folder,)

    def key(self, i: int) -> str:
        """The key of sample i, without reading a shard."""
        return self.index.key(i)

    def keys(self) -> list[str]:
        """All keys in order."""
        return [self.index.key(i) for i in range(len(self))]

    def shard(self, i: int) -> str:
        """The file name of the shard that holds sample i."""
        return self.manifest.shards[self.index.shard[i]].name

    def media(self, i: int) -> list[MediaItem]:
        """Sizes of sample i's media, without reading a shard. Their names are their numbers."""
        index, start, stop = self.index, self.index.media_start[i], self.index.media_start[i + 1]
        return [
            MediaItem(
                name=str(number),
                width=int(index.width[k]),
                height=int(index.height[k]),
                kind="image" if index.frames[k] == 1 else "video",
                frames=int(index.frames[k]),
                seconds=float(index.seconds[k]),
            )
            for number, k in enumerate(range(start, stop))
        ]

    def annotations(self, i: int) -> int:
        """Number of annotations of sample i, without reading a shard."""
        return int(self.index.annotations[i])

    def load(self, i: int) -> tuple[Sample, list[bytes]]:
        """Sample i and the encoded bytes of its media. Raises `BadSample` naming shard and key."""
        key, number = self.index.key(i), int(self.index.shard[i])
        where = f"{self.folder / self.manifest.shards[number].name}, key {key!r}"
        file = self._open(number)
        parts = []
        for member in self.index.members(i):
            data = os.pread(file.fileno(), member.size, member.offset)
            if len(data) != member.size or zlib.crc32(data) != member.crc:
                raise BadSample(f"{where}: member {member.name} is corrupt (checksum differs from the index)")
            parts.append((member.name, data))
        try:
            sample, blobs = to_sample(key, parts)
            for item, blob in zip(sample.media, blobs, strict=True):
                check_image(item, blob)
        except BadSample as error:
            raise BadSample(f"{where}: {error}") from error
        return sample, blobs

    def __iter__(self) -> Iterator[tuple[Sample, list[bytes]]]:
        return (self.load(i) for i in range(len(self)))

    def verify(self) -> None:
        """Hash every shard. Raises `DataError` naming each that differs from the manifest."""
        problems = []
        for info in self.manifest.shards:
            with open(self.folder / info.name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != info.sha256:
                problems.append(f"{self.folder / info.name}: sha256 {digest[:12]}, manifest says {info.sha256[:12]}")
        if problems:
            raise DataError("\n".join([*problems, self._remedy()]))

    def _check_files(self) -> None:
        problems = [p for info in (self.manifest.index, *self.manifest.shards) if (p := self._check_file(info))]
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise DataError("\n".join([*problems[:10], *more, self._remedy()]))

    def _check_file(self, info: FileInfo) -> str | None:
        path = self.folder / info.name
        if not path.is_file():
            return f"{path}: missing; the manifest lists {len(self.manifest.shards)} shards"
        size = path.stat().st_size
        return None if size == info.bytes else f"{path}: {size} bytes, the manifest says {info.bytes}"

    def _remedy(self) -> str:
        options = " ".join(_option(name, value) for name, value in self.manifest.build.items() if name != "_target_")
        if not options:
            return f"Restore the files, then: python -m data_pipelines.index folder={self.folder} force=true"
        return (
            f"Rebuild with: python -m data_pipelines.{self.manifest.command} {options} output={self.folder} force=true"
        )

    def _open(self, number: int) -> BinaryIO:
        """Shard `number`, opened lazily; each thread keeps its own few files, so that none closes another's."""
        files: OrderedDict[int, BinaryIO] = self._local.__dict__.setdefault("files", OrderedDict())
        if number not in files:
            if len(files) >= MAX_OPEN_FILES:
                files.popitem(last=False)[1].close()
            files[number] = open(self.folder / self.manifest.shards[number].name, "rb", buffering=0)  # noqa: SIM115
        files.move_to_end(number)
        return files[number]


def _option(name: str, value: object) -> str:
    """A recorded build argument as it is typed in a shell."""
    return shlex.quote(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
