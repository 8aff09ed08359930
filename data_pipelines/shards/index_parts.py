"""The index of a set of others' shards: one small file a shard, mapped when one of its samples is asked for.

What a process holds is the number of samples of each shard, and the index files of the few shards it read last.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.shards.index_file import Index, IndexEntry
from data_pipelines.shards.manifest import FileInfo

PARTS = "index.json"
PART_NAME = re.compile(r"index/\d{6,9}\.npz")
MAX_OPEN_PARTS = 128  # mapped files: each holds a file descriptor


class IndexParts:
    """N samples, shard by shard, as `Index` has them: `files` are the index files of the shards, in their order, and
    `locate` says where one lies on this machine, `remedy` what helps if it is damaged.

    Raises `DataError` for a file that is not there, damaged, or of another number of samples.
    """

    def __init__(self, files: Sequence[FileInfo], locate: Callable[[FileInfo], Path], remedy: str) -> None:
        self.files, self.locate, self.remedy = tuple(files), locate, remedy
        self.starts = np.concatenate([[0], np.cumsum([info.samples for info in files], dtype=np.int64)])
        self._open: OrderedDict[int, Index] = OrderedDict()
        self._checked = np.zeros(len(files), bool)  # against their checksums, once in a process

    def __len__(self) -> int:
        return int(self.starts[-1])

    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        parts = map(self.open_part, range(len(self.files)))
        return list(chain.from_iterable(part.keys() for part in parts))

    @property
    def shard(self) -> np.ndarray:
        """The shard of every sample `[N]`."""
        return np.repeat(np.arange(len(self.files), dtype=np.int32), np.diff(self.starts))

    def find_shard(self, i: int) -> int:
        """The number of the shard that holds sample i. Raises `IndexError` if there is none."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def find_runs(self) -> np.ndarray:
        """`[runs]` int64, the first sample of every shard that holds some."""
        return self.starts[:-1][np.diff(self.starts) > 0]

    def locate_sample(self, i: int) -> IndexEntry:
        """All that the index says of sample i. Raises `IndexError` if there is none."""
        shard = self.find_shard(i)
        return self.open_part(shard).locate_sample(i - int(self.starts[shard]))._replace(shard=shard)

    def read_media(self, i: int) -> list[tuple[int, int, int, float]]:
        """Width, height, frames and seconds of each media item of sample i."""
        shard = self.find_shard(i)
        return self.open_part(shard).read_media(i - int(self.starts[shard]))

    def count_annotations(self, i: int) -> int:
        """Number of annotations of sample i."""
        shard = self.find_shard(i)
        return self.open_part(shard).count_annotations(i - int(self.starts[shard]))

    def open_part(self, shard: int) -> Index:
        """The index of one shard, whose number is 0 in it."""
        if shard not in self._open:
            part = self._load_part(shard)
            if len(self._open) >= MAX_OPEN_PARTS:
                self._open.popitem(last=False)
            self._open[shard] = part
        self._open.move_to_end(shard)
        return self._open[shard]

    def _load_part(self, shard: int) -> Index:
        info = self.files[shard]
        path = self.locate(info)
        try:
            if not path.is_file() or path.stat().st_size != info.bytes:
                raise DataError(f"{path}: missing, or not of {info.bytes} bytes")
            part = Index.load(path, 1, checked=not self._checked[shard])
            if len(part) != info.samples:
                raise DataError(f"{path}: {len(part)} samples, {PARTS} says {info.samples}")
        except DataError as error:
            raise DataError(f"{error}. {self.remedy}") from error
        self._checked[shard] = True
        return part

    @classmethod
    def load(cls, path: Path, locate: Callable[[FileInfo], Path], remedy: str) -> IndexParts:
        """Read the list of the files. Raises `DataError` if it is missing or malformed."""
        try:
            files = [FileInfo(*row) for row in json.loads(path.read_text(encoding="utf-8"))["files"]]
            if not all(PART_NAME.fullmatch(info.name) for info in files):
                raise ValueError("a file name is not index/<number>.npz")
            return cls(files, locate, remedy)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not a readable index: {type(error).__name__}: {error}") from error


def format_parts(files: Sequence[FileInfo]) -> str:
    """The text of `index.json`."""
    return json.dumps({"files": [[info.name, info.bytes, info.sha256, info.samples] for info in files]})
