"""One part of a source, written alone: a folder of tars, their index and `part.json`, that is whole when it is there.

Who writes a part, how often, and beside whom, does not change a byte of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import EMPTY, BadSample, DataError, common_reason
from data_pipelines.sample import Sample
from data_pipelines.shards.index_file import INDEX
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.tar_writer import Shards
from data_pipelines.sources import Source

PART = "part.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was written of one part: `bad` holds the number within the part and the reason of each unusable record,
    `skipped` counts by reason what sources left out of samples (`meta["skipped"]`)."""

    samples: int
    shards: tuple[FileInfo, ...]
    stats: Mapping[str, Any]
    bad: tuple[tuple[int, str], ...]
    empty: Collection[int] = ()
    """The numbers of those of `bad` that hold nothing to learn."""
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Number of records that were read."""
        return self.samples + len(self.bad)

    @property
    def unusable(self) -> int:
        """Number of records that count against `max_bad`."""
        return len(self.bad) - len(self.empty)

    @classmethod
    def read(cls, folder: Path) -> Part:
        """The part that lies in `folder`. Raises `DataError` if it is damaged."""
        try:
            data = json.loads((folder / PART).read_text(encoding="utf-8"))
            data["shards"] = tuple(FileInfo(**info) for info in data["shards"])
            data["bad"] = tuple((number, reason) for number, reason in data["bad"])
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{folder}: a damaged part ({error}); remove it, and the same command continues") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWriter:
    """What a worker needs for any part. `max_bad` stops a part that alone has more unusable records."""

    source: Source
    folder: Path
    samples_per_shard: int
    max_shard_bytes: int
    max_bad: int
    refused: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Keys of a part that an earlier part has."""


def part_folder(folder: Path, number: int) -> Path:
    """Where part `number` lies in the hidden folder of the set."""
    return folder / f"part-{number:06d}"


def write_part(writer: PartWriter, number: int) -> Part:
    """Write part `number`; one that was stopped by `max_bad` is returned, but not kept.

    It is written under a name of its own and renamed: two processes that write the same part do not meet.
    """
    target = part_folder(writer.folder, number)
    working = target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir()
        part = _write_part(writer, number, working)
        if part.unusable <= writer.max_bad:
            _keep_folder(working, target, replace=number in writer.refused)
        return part
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{writer.folder}: no space left on this disk") from error
        raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _write_part(writer: PartWriter, number: int, working: Path) -> Part:
    shards = Shards(working, samples_per_shard=writer.samples_per_shard, max_bytes=writer.max_shard_bytes)
    refused = writer.refused.get(number, frozenset())
    bad: list[tuple[int, str]] = []
    empty: list[int] = []
    skipped: Counter[str] = Counter()
    try:
        for i, record in enumerate(writer.source.read(number)):
            try:
                if isinstance(record, BadSample):
                    raise record
                sample, blobs = record
                if sample.key in refused:
                    raise BadSample(f"sample {sample.key!r}: duplicate key, also in an earlier part")
                shards.write_sample(sample, blobs)
                skipped.update(common_reason(reason.partition(": ")[2] or reason) for reason in _list_skipped(sample))
            except BadSample as error:
                bad.append((i, str(error)))
                if error.kind == EMPTY:
                    empty.append(i)
                if len(bad) - len(empty) > writer.max_bad:
                    break
        infos = shards.close_last_tar()
    except BaseException:
        shards.close_unfinished()
        raise
    shards.index.write_file(working / INDEX)
    part = Part(
        samples=len(shards.index),
        shards=infos,
        stats=shards.stats.export_state(),
        bad=tuple(bad),
        empty=empty,
        skipped=dict(skipped),
    )
    with atomic_write(working / PART, sync=True) as file:
        json.dump(asdict(part), file)
    return part


def _list_skipped(sample: Sample) -> list[str]:
    """What the source left out of a sample, as `<number>: <reason>`."""
    found = sample.meta.get("skipped")
    return [reason for reason in found if isinstance(reason, str)] if isinstance(found, list) else []


def _keep_folder(working: Path, target: Path, *, replace: bool) -> None:
    if replace:
        shutil.rmtree(target, ignore_errors=True)
    try:
        working.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process has written the same part meanwhile.
