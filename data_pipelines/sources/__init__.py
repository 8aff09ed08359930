"""Sources: one file each, raw data -> records.

A source is a class with explicit keyword arguments whose instances have `name`, `licence`, `split` and `len()` (number
of records) and iterate over records, in the same order every time. A new source is one .py here and one .yaml in
`data_pipelines/conf/source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample

Record = tuple[Sample, list[bytes]] | BadSample
"""A sample with the encoded bytes of its media, or the error that stands for an unusable record."""


class Source(Protocol):
    """What `build` asks of a source."""

    name: str
    licence: str
    split: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...
