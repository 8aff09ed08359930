"""Sources: one file each, raw data -> records.

A source is a class with explicit keyword arguments whose instances have `name`, `license` and `split` and give their
records in `parts`. Parts are read alone, in any order and in any process, and every part gives the same records every
time: so a build can be spread, resumed, and still write the same shards. A source over a list of raw records derives
from `ListSource`, or from `FileSource` if they are those of one file; one over several files (tars, parquet) makes each
file a part. A new source is one .py here and one .yaml in `data_pipelines/conf/source`; `data_pipelines/raw` has what
sources share.

Options are called the same everywhere: `file` or `folder` holds the records, `images` or `videos` the files that they
name (`media`: both kinds), `limit` takes the first records, `split` says what they are, or chooses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Protocol

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.records import describe_record, read_records
from data_pipelines.sample import Sample
from data_pipelines.sources.common.layouts import hint_at_source, suggest_source
from data_pipelines.sources.common.samples import Record, try_record

__all__ = ["PART_SIZE", "FileSource", "ListSource", "Record", "Source", "iterate_records"]

PART_SIZE = 1000
"""Records of a part of a `ListSource`. Part of what a shard set holds: another number gives other shards."""


class Source(Protocol):
    """What `build` asks of a source. It is pickled once per process, so open files belong into `read`."""

    name: str
    license: str
    split: str

    @property
    def parts(self) -> int:
        """Number of parts that are written separately."""
        ...

    def read(self, part: int) -> Iterator[Record]:
        """The records of one part, in order."""
        ...


class ListSource(ABC):
    """A source whose raw records are a list in memory (its index; images stay on disk until `record` reads them)."""

    name: str
    license: str
    split: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of raw records."""

    @abstractmethod
    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Raw record i as a sample. Raises `BadSample`; a KeyError, TypeError, ValueError, IndexError or AttributeError
        counts as a malformed record, too."""

    def name_record(self, i: int) -> str:
        """What messages call raw record i."""
        return f"record {i}"

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-len(self) // PART_SIZE)

    def read(self, part: int) -> Iterator[Record]:
        """The records of one part; an unusable one is a `BadSample` that names it."""
        for i in range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(self))):
            yield try_record(partial(self.read_record, i), partial(self.name_record, i))

    def __iter__(self) -> Iterator[Record]:
        return iterate_records(self)


class FileSource(ListSource):
    """A source whose raw records are those of one file (.json with a list, .jsonl, .csv, .tsv, .parquet), or the first
    `limit` of them. Raises `DataError` for a file that does not read."""

    layouts: ClassVar[Collection[str]] = ()
    """The sources whose records this one reads, its own name among them. Where it is given, the message about a record
    that is laid out for another one names that one."""

    def __init__(self, file: str, limit: int | None = None) -> None:
        self.raw = read_records(file)
        self._refuse_tags_of_others(file)
        self._count = len(range(len(self.raw))[:limit])

    def __len__(self) -> int:
        return self._count

    def _refuse_tags_of_others(self, file: str) -> None:
        """Raise `DataError` if the first record has its images in tags that this source would read as text."""
        try:
            first = self.raw[0] if self.layouts and len(self.raw) else None
        except BadSample:
            return
        if suggest_source(first) == "qwen_vl" and "qwen_vl" not in self.layouts:
            raise DataError(
                f"file: {file} has images in <img> tags, here they would be text; source=qwen_vl reads them"
            )

    def read(self, part: int) -> Iterator[Record]:
        """The records of one part; an unusable one is a `BadSample` that names it."""
        for i, record in enumerate(super().read(part), part * PART_SIZE):
            yield self._name_source(i, record) if isinstance(record, BadSample) and self.layouts else record

    def _name_source(self, i: int, error: BadSample) -> BadSample:
        """The error, with the source that reads records like record i."""
        try:
            hint = hint_at_source(self.raw[i], self.layouts)
        except BadSample:
            return error
        return BadSample(f"{error}{hint}", kind=error.kind)

    def name_record(self, i: int) -> str:
        """The record's own id, or its line."""
        return describe_record(self.raw, i)

    def make_key(self, i: int, record: Mapping[str, Any]) -> str:
        """A sample's key: the number of its record, and the record's own id where it has one. Raises `BadSample` for a
        record that is no object."""
        if not isinstance(record, Mapping):
            raise BadSample(f"holds a {type(record).__name__}, not an object")
        own = record.get("id")
        return f"{i:07d}" if own is None else f"{i:07d}-{own}"


def iterate_records(source: Source) -> Iterator[Record]:
    """All records of a source, in order."""
    return chain.from_iterable(source.read(part) for part in range(source.parts))
