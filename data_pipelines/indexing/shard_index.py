"""The index of one shard, written alone: `index/<number>.npz`, and `index/<number>.json`, which is there when it is
whole. Who writes it, how often, and beside whom, does not change a byte of it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Sample
from data_pipelines.shards.checksum import crc32
from data_pipelines.shards.index_file import IndexBuilder
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.members import MAX_MEMBER, Member, check_end, is_plain, open_tar, safe_key
from data_pipelines.shards.remote import download_file, is_remote
from data_pipelines.shards.stats import Stats, measure_lengths

Members = list[tuple[Member, bytes]]
Found = tuple[Sample, list[bytes]]
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


def read_shard(job: IndexJob, number: int, fetched: Path) -> Iterator[tuple[str, Found | DataError]]:
    """The samples of shard `number` in file order: the key, and the sample and its media, or why it cannot be used.

    Once all are taken, the shard's index and record are written, unless they are there and count the same. A remote
    shard is fetched whole into the folder `fetched`, where its space is freed when it is closed. Raises `DataError` if
    it cannot be had.
    """
    builder, stats, bad = IndexBuilder(), Stats(), list[tuple[str, str]]()
    with _open_shard(job.addresses[number], fetched) as file:
        for key, members in scan_samples(file, job.layout):
            try:
                if isinstance(members, BadSample):
                    raise members
                found = job.layout.read_sample(key, [(member.name, data) for member, data in members])
                builder.add_sample(0, found[0], [member for member, _ in members])
            except DataError as error:
                bad.append((key, str(error)))
                yield key, error
                continue
            stats.add_lengths(measure_lengths(*found))
            yield key, found
        known = find_record(job, number)
        if known is None or (known.shard.samples, len(known.bad)) != (len(builder), len(bad)):
            _write_record(job, number, file, builder, stats, bad)


def _open_shard(address: str, fetched: Path) -> BufferedReader:
    if not is_remote(address):
        try:
            return open(address, "rb")
        except OSError as error:
            raise DataError(f"{address}: cannot be read: {error}") from error
    fetched.mkdir(parents=True, exist_ok=True)
    for left in fetched.glob(".fetched-*"):  # of processes that were killed while they fetched
        with suppress(FileNotFoundError):  # another process has just fetched it
            if left.stat().st_mtime < time.time() - FORGOTTEN:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=fetched, prefix=".fetched-") as folder:
        path = Path(folder) / "shard.tar"
        download_file(address, path)
        return open(path, "rb")


def _write_record(
    job: IndexJob, number: int, file: BufferedReader, builder: IndexBuilder, stats: Stats, bad: list[tuple[str, str]]
) -> None:
    (job.folder / "index").mkdir(parents=True, exist_ok=True)
    part = builder.write_file(record_path(job.folder, number).with_suffix(".npz"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = ShardRecord(
        shard=FileInfo(job.addresses[number], file.tell(), digest, len(builder)),
        index=FileInfo(f"index/{part.name}", part.bytes, part.sha256, len(builder)),
        stats=stats.export_state(),
        bad=tuple(bad),
        layout=job.layout.to_json(),
    )
    with atomic_write(record_path(job.folder, number), sync=True) as out:
        json.dump(asdict(record), out)


def scan_samples(file: BufferedReader, layout: Layout) -> Iterator[tuple[str, Members | BadSample]]:
    """The samples of a tar in file order: the key, and the members that `layout` reads, or why it has none.

    What cannot be read of a damaged tar is a bad sample. Raises `DataError` where the disk does not give its bytes.
    """
    try:
        with open_tar(file) as tar:
            for key, found in groupby(_read_members(tar, layout), key=itemgetter(0)):
                members, problems = Members(), list[str]()
                for _, member in found:
                    if isinstance(member, str):
                        problems.append(member)
                    elif member is not None:
                        members.append(member)
                names = [member.name for member, _ in members]
                if len(set(names)) < len(names):
                    problems.append(f"members {names}: one comes twice")
                yield key, BadSample(f"sample {key!r}: {problems[0]}") if problems else members
            check_end(tar)
    except (tarfile.TarError, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # of the disk, not of the tar; it may pass
            raise DataError(f"{file.name}: cannot be read: {error}") from error
        yield "", BadSample(f"truncated or not an uncompressed tar, what follows is left out: {error}")


def _read_members(tar: tarfile.TarFile, layout: Layout) -> Iterator[tuple[str, tuple[Member, bytes] | str | None]]:
    """The key of every member, and the member: a text says what is wrong with it, None that the layout has no use for
    it. Nothing else of it is read."""
    for info in tar:
        if info.isdir():
            continue
        folder, _, base = info.name.removeprefix("./").rpartition("/")
        stem, _, name = base.partition(".")
        key = safe_key(f"{folder}/{stem}" if folder else stem)
        if not layout.is_used(name):
            yield key, None
        elif not is_plain(info) or info.size > MAX_MEMBER:
            yield key, f"member {name!r} of {info.size} bytes is no plain file of at most {MAX_MEMBER} bytes"
        else:
            file = tar.extractfile(info)
            data = file.read() if file else b""
            if len(data) != info.size:
                raise tarfile.ReadError(f"{info.name!r} has {len(data)} of {info.size} bytes")
            yield key, (Member(name, info.offset_data, info.size, crc32(data)), data)
