"""Sources: one file each, raw data -> records.

A source is a class with explicit keyword arguments whose instances have `name`, `licence` and `split` and give their
records in `parts`. Parts are read alone, in any order and in any process, and every part gives the same records every
time: so a build can be spread, resumed, and still write the same shards. A source over a list of raw records derives
from `ListSource`; one over files (tars, parquet) makes each file a part. A new source is one .py here and one .yaml in
`data_pipelines/conf/source`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample

Record = tuple[Sample, list[bytes]] | BadSample
"""A sample with the encoded bytes of its media, or the error that stands for an unusable record."""

PART_SIZE = 1000
"""Records of a part of a `ListSource`. Part of what a shard set holds: another number gives other shards."""


class Source(Protocol):
    """What `build` asks of a source. It is pickled once per process, so open files belong into `read`."""

    name: str
    licence: str
    split: str

    @property
    def parts(self) -> int:
        """Number of parts."""
        ...

    def read(self, part: int) -> Iterator[Record]:
        """The records of one part, in order."""
        ...


class ListSource(ABC):
    """A source whose raw records are a list in memory (its index; images stay on disk until `record` reads them)."""

    name: str
    licence: str
    split: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of raw records."""

    @abstractmethod
    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Raw record i as a sample. Raises `BadSample`; a KeyError, TypeError, ValueError, IndexError or AttributeError
        counts as a malformed record, too."""

    def label(self, i: int) -> str:
        """What messages call raw record i."""
        return f"record {i}"

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-len(self) // PART_SIZE)

    def read(self, part: int) -> Iterator[Record]:
        """The records of one part; an unusable one is a `BadSample` that names it."""
        for i in range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(self))):
            try:
                yield self.record(i)
            except BadSample as error:
                yield BadSample(f"{self.label(i)}: {error}")
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                yield BadSample(f"{self.label(i)}: malformed: {type(error).__name__}: {error}")

    def __iter__(self) -> Iterator[Record]:
        return records(self)


def records(source: Source) -> Iterator[Record]:
    """All records of a source, in order."""
    return chain.from_iterable(source.read(part) for part in range(source.parts))
