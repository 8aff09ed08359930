"""The samples of a tar that anybody wrote, in file order. Only members that its layout reads are looked into."""

from __future__ import annotations

import errno
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from itertools import groupby
from operator import itemgetter

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.formats import describe_format
from data_pipelines.shards.checksum import crc32
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.members import MAX_MEMBER, Member, check_end, is_plain, open_tar, unique_key

Members = list[tuple[Member, bytes]]
SPLIT = "duplicate key, or its members do not lie one after another"


def scan_samples(file: BufferedReader, layout: Layout) -> Iterator[tuple[str, Members | BadSample]]:
    """The samples of a tar in file order: the key, and the members that `layout` reads, or why it has none.

    What cannot be read of a damaged tar is a bad sample. Raises `DataError` where the disk does not give its bytes.
    """
    done = set[str]()
    try:
        tar = open_tar(file)
    except (tarfile.TarError, OSError) as error:
        yield "", _describe_damage(file, error, opened=False)
        return
    try:
        with tar:
            for key, found in groupby(_read_members(tar, layout), key=itemgetter(0)):
                members, problems = Members(), [SPLIT] if key in done else []
                done.add(key)
                for _, member in found:
                    if isinstance(member, str):
                        problems.append(member)
                    elif member is not None:
                        members.append(member)
                names = Counter(member.name for member, _ in members)
                problems += [f"member {name!r} comes twice" for name, count in names.items() if count > 1]
                yield key, BadSample(f"sample {key!r}: {problems[0]}") if problems else members
            check_end(tar)
    except (tarfile.TarError, OSError) as error:
        yield "", _describe_damage(file, error, opened=True)


def _describe_damage(file: BufferedReader, error: Exception, *, opened: bool) -> BadSample:
    """Why a tar, or what follows in it, is left out. Raises `DataError` where the disk is to blame; that may pass."""
    if getattr(error, "errno", None) not in (None, errno.EINVAL):
        raise DataError(f"{file.name}: cannot be read: {error}") from error
    if opened:
        return BadSample(f"truncated or damaged, what follows is left out: {error}")
    file.seek(0)
    return BadSample(f"truncated or not an uncompressed tar, found {describe_format(file.read(512))}: {error}")


def _read_members(tar: tarfile.TarFile, layout: Layout) -> Iterator[tuple[str, tuple[Member, bytes] | str | None]]:
    """The key of every member, and the member: a text says what is wrong with it, None that the layout has no use for
    it. Nothing else of it is read. Folders, and names that begin with a dot or have none, belong to no sample."""
    for info in tar:
        folder, _, base = info.name.removeprefix("./").rpartition("/")
        stem, dot, name = base.partition(".")
        if info.isdir() or not stem or not dot:
            continue
        key = unique_key(f"{folder}/{stem}" if folder else stem)
        if not layout.is_used(name):
            yield key, None
        elif not is_plain(info):
            yield key, f"member {name!r} is a link or another thing that is no plain file"
        elif info.size > MAX_MEMBER:
            yield key, f"member {name!r} of {info.size} bytes; at most {MAX_MEMBER} are read"
        else:
            file = tar.extractfile(info)
            data = file.read() if file else b""
            if len(data) != info.size:
                raise tarfile.ReadError(f"{info.name!r} has {len(data)} of {info.size} bytes")
            yield key, (Member(name, info.offset_data, info.size, crc32(data)), data)
