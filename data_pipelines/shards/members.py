"""The tar level of a shard: consecutive members `<key>.<name>` form one sample (the WebDataset convention).

Only JSON, text, image and video members are read. Anything else (pickles, tensors, links) is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.errors import BadSample
from data_pipelines.media.limits import media_item
from data_pipelines.media.video import DEMUXERS
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn

JSON, TEXT = "json", "txt"
MEDIA = ("jpg", "jpeg", "png", "webp", *DEMUXERS)
ALLOWED = (JSON, TEXT, *MEDIA)
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
BLOCK = 512  # tar block size
SHOWN = 6  # names of members in a message
MAX_MEMBER = 2**30
"""Bytes of one file of a sample."""
MAX_HEADER = 2**20
"""Bytes of a long name or of pax fields before a member."""
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(NamedTuple):
    """Where one file of a sample lies in its shard: `name` without the key, byte `offset` and `size`, CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


def safe_key(text: str) -> str:
    """`text` as a key: every character outside `A-Z a-z 0-9 _ -` becomes `_`, at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:80] or "_"


def unique_key(name: str) -> str:
    """A key for the name of a sample in another program's tar: other names, other keys, whatever their alphabet."""
    key = safe_key(name)
    return key if key == name.replace("/", "_") else f"{key[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class _BoundedInfo(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads whole, has at most `MAX_HEADER` bytes."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"extended header of {self.size} bytes; at most {MAX_HEADER} are read")
        return super()._proc_member(tar)  # type: ignore[misc]


def open_tar(source: Path | BinaryIO) -> tarfile.TarFile:
    """An uncompressed tar. Raises `tarfile.TarError` and `OSError`, now and while its members are read."""
    if isinstance(source, Path):
        return tarfile.open(source, "r:", tarinfo=_BoundedInfo)
    return tarfile.open(fileobj=source, mode="r:", tarinfo=_BoundedInfo)


def member_extension(name: str) -> str:
    """The last, lower-case extension of a member name: `0.PNG` -> `png`, `json` -> `json`."""
    return name.rsplit(".", 1)[-1].lower()


def check_end(tar: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless the walk over a tar's members came to its end mark: a damaged header, or a cut
    between two members, ends it as quietly."""
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}")


def is_plain(info: tarfile.TarInfo) -> bool:
    """Whether a member is a file stored as it is; a sparse one may claim any size."""
    return info.isreg() and not info.issparse()


def list_names(names: Sequence[str]) -> str:
    """The members of a sample as messages name them: the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    alike = len({member_extension(name) for name in names}) < len(names)
    return f"{list(names[:SHOWN])}{more}{' (a key ends at the first dot of a name)' if alike else ''}"


def to_sample(key: str, parts: list[tuple[str, bytes]]) -> tuple[Sample, list[bytes]]:
    """The sample of members `(name, bytes)`. Raises `BadSample`.

    Shards of other programs, whose JSON is not ours, are read as captioned media: a user turn with the images and
    videos and an assistant turn with the `txt` member; their JSON becomes `meta`.
    """
    by_name = dict(parts)
    sample = parse_json(key, by_name[JSON]) if JSON in by_name else {}
    if not isinstance(sample, Sample):
        return _caption_sample(key, parts, sample)
    expected, got = [JSON, *(item.name for item in sample.media)], list(by_name)
    if sorted(expected) != sorted(got):
        raise BadSample(f"sample {key!r}: members {list_names(got)}, its JSON names {list_names(expected)}")
    return sample, [by_name[item.name] for item in sample.media]


def parse_json(key: str, data: bytes) -> Sample | dict[str, Any]:
    """Our own sample, without its media, or what another program's JSON holds. Raises `BadSample`."""
    value = parse_object(key, data)
    return Sample.from_json(key, value) if {"version", "annotations"} <= value.keys() else value


def parse_object(key: str, data: bytes) -> dict[str, Any]:
    """The JSON object of a sample's member. Raises `BadSample`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"sample {key!r}: member json does not parse: {error}") from error
    if not isinstance(value, dict):
        raise BadSample(f"sample {key!r}: member json holds a {type(value).__name__}, not an object")
    return value


def _caption_sample(key: str, parts: list[tuple[str, bytes]], meta: dict[str, Any]) -> tuple[Sample, list[bytes]]:
    texts = [data for name, data in parts if member_extension(name) == TEXT]
    blobs = [data for name, data in parts if member_extension(name) in MEDIA]
    if len(texts) != 1 or not blobs:
        names = list_names([name for name, _ in parts])
        raise BadSample(f"sample {key!r}: members {names}; expected our json, or one txt and some media")
    try:
        caption = texts[0].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"sample {key!r}: member txt is not UTF-8: {error}") from error
    media = tuple(media_item(number, data) for number, data in enumerate(blobs))
    return Sample(key=key, media=media, annotations=(caption_annotation(caption, images=len(media)),), meta=meta), blobs


def caption_annotation(caption: str, images: int = 1) -> Annotation:
    """A caption as an annotation: a user turn with the images alone, an assistant turn with the text."""
    turns = (
        Turn(role="user", parts=tuple(Media(item=number) for number in range(images))),
        Turn(role="assistant", parts=(Text(text=caption),)),
    )
    return Annotation(turns=turns)
