"""The index of one shard, written alone: `index/<number>.npz`, and `index/<number>.json`, which is there when it is
whole. Who writes it, how often, and beside whom, does not change a byte of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import BadSample, DataError
from data_pipelines.indexing.tar_samples import scan_samples
from data_pipelines.sample import Sample
from data_pipelines.shards.index_file import IndexBuilder
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.remote import download_file, is_remote
from data_pipelines.shards.stats import Stats, measure_lengths

Found = tuple[Sample, list[bytes]]
KNOWN = "duplicate key, an earlier shard has it; with shards= keys are unique within their shard only"
FORGOTTEN = 24 * 3600
"""Seconds after which a shard that is still being fetched belongs to nobody."""


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """What a worker needs for any shard: the addresses of all, and the folder that takes their indexes."""

    addresses: tuple[str, ...]
    folder: Path
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What was found in a shard. `bad` are the keys and reasons of the samples that were left out."""

    shard: FileInfo
    index: FileInfo
    stats: Mapping[str, Any]
    bad: tuple[tuple[str, str], ...]
    layout: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ShardRecord | None:
        """The record of a shard that was indexed before; None if there is none, or it is damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            shard, index = FileInfo(**data.pop("shard")), FileInfo(**data.pop("index"))
            bad = tuple((key, reason) for key, reason in data.pop("bad"))
            return cls(shard=shard, index=index, bad=bad, **data)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


class FoundSamples:
    """What is found in one shard or several: the index and the lengths of the samples, key and reason of the bad."""

    def __init__(self) -> None:
        self.index, self.stats, self.bad = IndexBuilder(), Stats(), list[tuple[str, str]]()

    def read_samples(
        self, file: BufferedReader, layout: Layout, shard: int = 0
    ) -> Iterator[tuple[str, Found | BadSample]]:
        """The samples of a tar in file order: the key, and the sample and its media, or why it cannot be used."""
        for key, members in scan_samples(file, layout):
            try:
                if isinstance(members, BadSample):
                    raise members
                if key in self.index:
                    raise BadSample(f"sample {key!r}: {KNOWN}")
                found = layout.read_sample(key, [(member.name, data) for member, data in members])
            except BadSample as error:
                self.bad.append((key, str(error)))
                yield key, error
                continue
            self.index.add_sample(shard, found[0], [member for member, _ in members])
            self.stats.add_lengths(measure_lengths(*found))
            yield key, found


def record_path(folder: Path, number: int) -> Path:
    """Where the record of shard `number` lies."""
    return folder / "index" / f"{number:06d}.json"


def find_record(job: IndexJob, number: int) -> ShardRecord | None:
    """The record of a shard that was indexed before, unless the shard, or the layout, is another now."""
    record, address = ShardRecord.read(record_path(job.folder, number)), job.addresses[number]
    if record is None or record.shard.name != address or record.layout != job.layout.to_json():
        return None
    part = job.folder / record.index.name
    whole = part.is_file() and part.stat().st_size == record.index.bytes
    same = is_remote(address) or (Path(address).is_file() and Path(address).stat().st_size == record.shard.bytes)
    return record if whole and same else None


def index_shard(job: IndexJob, number: int) -> ShardRecord:
    """Read shard `number` once, from wherever it lies, and write its index and its record.

    A sample that cannot be used, and what follows a cut, is left out and noted. Raises `DataError` if the shard cannot
    be had at all.
    """
    for _ in read_shard(job, number, job.folder / "index"):
        pass
    record = ShardRecord.read(record_path(job.folder, number))
    assert record is not None, "written above"
    return record


def read_shard(job: IndexJob, number: int, fetched: Path) -> Iterator[tuple[str, Found | BadSample]]:
    """The samples of shard `number` in file order: the key, and the sample and its media, or why it cannot be used.

    Once all are taken, the shard's index and record are written, unless they are there and count the same. A remote
    shard is fetched whole into the folder `fetched`, where its space is freed when it is closed. Raises `DataError` if
    it cannot be had.
    """
    found = FoundSamples()
    with open_shard(job.addresses[number], fetched) as file:
        yield from found.read_samples(file, job.layout)
        known = find_record(job, number)
        if known is None or (known.shard.samples, len(known.bad)) != (len(found.index), len(found.bad)):
            _write_record(job, number, file, found)


def open_shard(address: str, fetched: Path | None = None) -> BufferedReader:
    """The bytes of a shard; a remote one is fetched into `fetched` first. Raises `DataError` if it cannot be had."""
    if not is_remote(address):
        try:
            return open(address, "rb")
        except OSError as error:
            raise DataError(f"{address}: cannot be read: {error}") from error
    assert fetched is not None, "of a remote shard"
    fetched.mkdir(parents=True, exist_ok=True)
    for left in fetched.glob(".fetched-*"):  # of processes that were killed while they fetched
        with suppress(FileNotFoundError):  # another process has just fetched it
            if left.stat().st_mtime < time.time() - FORGOTTEN:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=fetched, prefix=".fetched-") as folder:
        path = Path(folder) / "shard.tar"
        download_file(address, path)
        return open(path, "rb")


def describe_shard(name: str, file: BufferedReader, samples: int) -> FileInfo:
    """The manifest's line of a shard that was read."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(name, file.tell(), digest, samples)


def _write_record(job: IndexJob, number: int, file: BufferedReader, found: FoundSamples) -> None:
    (job.folder / "index").mkdir(parents=True, exist_ok=True)
    part = found.index.write_file(record_path(job.folder, number).with_suffix(".npz"))
    record = ShardRecord(
        shard=describe_shard(job.addresses[number], file, len(found.index)),
        index=FileInfo(f"index/{part.name}", part.bytes, part.sha256, len(found.index)),
        stats=found.stats.export_state(),
        bad=tuple(found.bad),
        layout=job.layout.to_json(),
    )
    with atomic_write(record_path(job.folder, number), sync=True) as out:
        json.dump(asdict(record), out)
