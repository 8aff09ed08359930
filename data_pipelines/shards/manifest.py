"""`manifest.json`: what a folder of shards holds. It is written last, so its existence means the set is complete."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import DataError
from data_pipelines.sample import SCHEMA_VERSION

MANIFEST = "manifest.json"
VERSION = 1
SHARED = re.compile(r"\.\./[\w-][\w.-]*/[\w-][\w.-]*\.tar", re.ASCII)  # a shard of a set beside this one


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the set; `samples` is 0 for the index. Raises ValueError for what cannot be one: most are read."""

    name: str
    bytes: int
    sha256: str
    samples: int = 0

    def __post_init__(self) -> None:
        counts = all(isinstance(number, int) and 0 <= number < 2**63 for number in (self.bytes, self.samples))
        if not counts or not isinstance(self.name, str) or not isinstance(self.sha256, str):
            raise ValueError(f"not the name, bytes, sha256 and samples of a file: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete shard set. `command` made it with the arguments `build`; `stats` describes its lengths (see `Stats`).

    `bad` counts the unusable records that were left out by reason, `skipped` the questions, captions or regions that
    were left out of samples, `dropped` the samples that filters left out.
    `origin` says from which set another was made, by its fingerprint, and what else went into it. A view
    is a set without shards of its own: it names those of a set beside it as `../<folder>/<shard>.tar`, and its index
    holds the samples that were kept. `layout` says what the members of others' samples are (see `Layout`); with
    `elsewhere`, the shards are named by their addresses, and the folder holds their indexes only.
    """

    samples: int
    shards: tuple[FileInfo, ...]
    index: FileInfo
    source: str = ""
    license: str = ""
    split: str = ""
    build: Mapping[str, Any] = field(default_factory=dict)
    command: str = "build"
    stats: Mapping[str, Any] = field(default_factory=dict)
    bad: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: bool = False
    version: int = VERSION
    sample_version: int = SCHEMA_VERSION

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def is_view(self) -> bool:
        """Whether the shards lie in another set's folder."""
        return any("/" in shard.name for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their order; the same data built elsewhere has the same one."""
        content: list[Any] = [self.version, self.sample_version]
        content.append([(shard.samples, shard.sha256) for shard in self.shards])
        if self.is_view or self.layout:
            content.append(self.index.sha256)  # other samples of the same shards
        if self.layout:
            content.append(dict(self.layout))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe_remedy(self, folder: Path) -> str:
        """What makes the set in `folder` again, as a sentence or a command."""
        options = " ".join(_format_option(name, value) for name, value in self.build.items() if name != "_target_")
        if options:
            return f"Rebuild with: python -m data_pipelines.{self.command} {options} output={folder} force=true"
        if self.layout:
            damaged = f"delete what is damaged and {folder / MANIFEST}"
            return f"Restore the files, or {damaged}, and index the set again: only what is missing is read."
        return f"Restore the files, then: python -m data_pipelines.index folder={folder} force=true"

    def write(self, folder: Path) -> None:
        """Write `manifest.json` under another name first, so that a half-written one is never seen."""
        with atomic_write(folder / MANIFEST, sync=True) as file:
            data = asdict(self) | {"bytes": self.bytes, "fingerprint": self.fingerprint}
            for name in ("layout", "elsewhere"):  # of others' shards only
                if not data[name]:
                    del data[name]
            json.dump(data, file, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `DataError` if `folder` has no readable manifest."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(_describe_missing(folder))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise DataError(f"{path}: version {data['version']!r}, this program reads {VERSION}; rebuild the set")
            for derived in ("bytes", "fingerprint"):
                data.pop(derived, None)
            for named in (data, data.get("build", {})):  # as it was spelled before
                if "licence" in named:
                    named["license"] = named.pop("licence")
            for name in ("build", "stats", "bad", "skipped", "dropped", "origin", "layout"):
                if not isinstance(data.get(name, {}), dict):
                    raise ValueError(f"{name} is {data[name]!r:.40}, not an object")
            elsewhere = data.get("elsewhere", False) is True
            shards = tuple(_file_info(shard, shared=True, anywhere=elsewhere) for shard in data.pop("shards"))
            return cls(shards=shards, index=_file_info(data.pop("index")), **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: malformed: {type(error).__name__}: {error}") from error


def _file_info(data: Mapping[str, Any], *, shared: bool = False, anywhere: bool = False) -> FileInfo:
    """A file of the set; a `shared` one may lie in a set beside it, but nowhere else, and one `anywhere` is named by
    its address: the user of this machine has named it."""
    info = FileInfo(**data)
    if anywhere:
        return info
    plain = Path(info.name).name == info.name and info.name not in ("", ".", "..")
    if not plain and not (shared and SHARED.fullmatch(info.name)):
        raise ValueError(f"file name {info.name!r} is a path; only ../<folder>/<shard>.tar may lie outside the folder")
    return info


def _format_option(name: str, value: object) -> str:
    """A recorded build argument as it is typed in a shell."""
    return shlex.quote(f"{name}={value if isinstance(value, str) else json.dumps(value)}")


def _describe_missing(folder: Path) -> str:
    if not folder.is_dir():
        problem, remedy = "no such folder", f"python -m data_pipelines.build source=<name> output={folder}"
    elif any(folder.glob("*.tar")):
        problem, remedy = f"tars without {MANIFEST}", f"python -m data_pipelines.index folder={folder}"
    else:
        problem, remedy = f"no {MANIFEST}", f"python -m data_pipelines.build source=<name> output={folder}"
    return f"{folder} is not a shard set: {problem}. Make it with: {remedy}"
