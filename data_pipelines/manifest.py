"""`manifest.json`: what a folder of shards holds. It is written last, so its existence means the set is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.sample import SCHEMA_VERSION, Sample

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One file of the set; `samples` is 0 for the index."""

    name: str
    bytes: int
    sha256: str
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete shard set. `build` holds the arguments that made it, `stats` min, mean and max of lengths."""

    samples: int
    shards: tuple[FileInfo, ...]
    index: FileInfo
    source: str = ""
    licence: str = ""
    split: str = ""
    build: Mapping[str, Any] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION
    sample_version: int = SCHEMA_VERSION

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their order; the same data built elsewhere has the same one."""
        content = [self.version, self.sample_version, [(shard.samples, shard.sha256) for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` under another name first, so that a half-written one is never seen."""
        partial = folder / f".{MANIFEST}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self) | {"bytes": self.bytes, "fingerprint": self.fingerprint}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `DataError` if `folder` has no readable manifest."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(_missing(folder))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise DataError(f"{path}: version {data['version']!r}, this program reads {VERSION}; rebuild the set")
            for derived in ("bytes", "fingerprint"):
                data.pop(derived, None)
            shards = tuple(_file_info(shard) for shard in data.pop("shards"))
            return cls(shards=shards, index=_file_info(data.pop("index")), **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: malformed: {type(error).__name__}: {error}") from error


class Stats:
    """Running minimum, mean and maximum of what describes a sample's length."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def add(self, sample: Sample, blobs: list[bytes]) -> None:
        """Count one sample."""
        self._count("annotations", len(sample.annotations))
        self._count("media", len(sample.media))
        for annotation in sample.annotations:
            self._count("turns", len(annotation.turns))
            self._count("chars", sum(len(turn.text) for turn in annotation.turns))
        for item, blob in zip(sample.media, blobs, strict=True):
            self._count("width", item.width)
            self._count("height", item.height)
            self._count("media_bytes", len(blob))
            if item.kind == "video":
                self._count("frames", item.frames)
                self._count("seconds", item.seconds)

    def _count(self, name: str, value: float) -> None:
        count, total, low, high = self._totals.get(name, (0, 0, value, value))
        self._totals[name] = [count + 1, total + value, min(low, value), max(high, value)]

    def to_json(self) -> dict[str, dict[str, float]]:
        """`{name: {count, min, mean, max}}`; chars and turns are per annotation, sizes per media item."""
        return {
            name: {"count": int(count), "min": low, "mean": round(total / count, 3), "max": high}
            for name, (count, total, low, high) in self._totals.items()
        }


def _file_info(data: Mapping[str, Any]) -> FileInfo:
    info = FileInfo(**data)
    if Path(info.name).name != info.name:
        raise ValueError(f"file name {info.name!r} is a path")
    return info


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        problem, remedy = "no such folder", f"python -m data_pipelines.build source=<name> output={folder}"
    elif any(folder.glob("*.tar")):
        problem, remedy = f"tars without {MANIFEST}", f"python -m data_pipelines.index folder={folder}"
    else:
        problem, remedy = f"no {MANIFEST}", f"python -m data_pipelines.build source=<name> output={folder}"
    return f"{folder} is not a shard set: {problem}. Make it with: {remedy}"
