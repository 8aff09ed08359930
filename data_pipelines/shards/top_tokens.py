"""Top tokens: of every learned token of a sample, the most likely ones that a teacher names, and how likely they are.

Ragged arrays beside the JSON Lines of columns, one file a shard: records of fixed size, one a token, in the order of
the lines. A line says where its records begin, how many they are, and the hash of the file: `[first, count, sha256]`.
Nothing is unpickled, and what points outside of a file, or of the vocabulary, is refused. Legend: S learned tokens of a
sample, K ids of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.columns import KEY, Columns
from data_pipelines.shards.shard_set import ShardSet


class TopTokens(NamedTuple):
    """Of one sample: token ids `[S, K]`, the most likely first, and their log-probabilities `[S, K]`."""

    ids: NDArray[np.int32]
    logps: NDArray[np.float16]


def record_type(top_k: int) -> np.dtype[Any]:
    """The record of one token: K ids and K log-probabilities, little-endian."""
    return np.dtype([("ids", "<i4", (top_k,)), ("logps", "<f2", (top_k,))])


def array_file(shard: int) -> str:
    """The file of the records of shard number `shard`."""
    return f"shard-{shard:06d}.bin"


def write_records(folder: Path, shard: int, samples: Sequence[TopTokens], top_k: int) -> list[list[Any]]:
    """Write the records of a shard. Returns `[first, count, sha256]` of every sample, for its line."""
    counts = [len(sample.ids) for sample in samples]
    records = np.zeros(sum(counts), record_type(top_k))
    places, first = [], 0
    for sample, count in zip(samples, counts, strict=True):
        records["ids"][first : first + count] = sample.ids
        records["logps"][first : first + count] = sample.logps
        places.append([first, count])
        first += count
    data = records.tobytes()
    with atomic_write(folder / array_file(shard), "wb", sync=True) as file:
        file.write(data)
    digest = hashlib.sha256(data).hexdigest()
    return [[*place, digest] for place in places]


@dataclass(frozen=True)
class TopTokenColumn:
    """A column of top tokens, read sample by sample from mapped files. Picklable: files open lazily per process.

    Attributes:
        places: `[samples of the shard set, 2]`, first record and number of records in the shard's file; -1, -1: none.
        shard_starts: number of the first sample of every shard.
        top_k, vocab_size: K, and the size of the teacher's vocabulary; vocabulary: its hash.
    """

    folder: Path
    name: str
    places: NDArray[np.int64]
    shard_starts: NDArray[np.int64]
    top_k: int
    vocab_size: int
    vocabulary: str

    def require_vocabulary(self, digest: str) -> None:
        """Raises `DataError` if the teacher's vocabulary has another hash."""
        if self.vocabulary != digest:
            raise DataError(f"{self.folder}: was computed with another vocabulary than this run's tokenizer has")

    def read_sample(self, number: int, learned: int) -> TopTokens:
        """The top tokens of sample `number` of the shard set, which has `learned` of them.

        Raises:
            BadSample: it has none, more or fewer, or records that cannot be.
        """
        first, count = (int(one) for one in self.places[number])
        if first < 0:
            raise BadSample(f"column {self.name!r}: the sample has no top tokens", kind="column")
        if count != learned:
            raise BadSample(f"column {self.name!r} has {count} tokens, the sample {learned}", kind="column")
        shard = int(np.searchsorted(self.shard_starts, number, side="right")) - 1
        kind = record_type(self.top_k)
        path = self.folder / array_file(shard)
        with path.open("rb") as file:
            file.seek(first * kind.itemsize)
            data = file.read(count * kind.itemsize)
        if len(data) != count * kind.itemsize:
            raise BadSample(f"column {self.name!r}: {path} ends before the sample's records", kind="column")
        records = np.frombuffer(data, kind)
        ids, logps = records["ids"], records["logps"]
        inside = bool(((ids >= 0) & (ids < self.vocab_size)).all())
        if not inside or not bool((logps <= 0).all()):  # not a number is not below 0
            raise BadSample(f"column {self.name!r}: {path} has ids or log-probabilities that cannot be", kind="column")
        return TopTokens(ids, logps)


def open_top_tokens(columns: Columns, name: str, shards: ShardSet) -> TopTokenColumn:
    """The column `name` of top tokens, every place and file of which is checked.

    Raises:
        DataError: it is no such column, a file is damaged, or a line points outside of its file.
    """
    about: Mapping[str, Any] = columns.manifest.about
    top_k, vocab_size = about.get("top_k"), about.get("vocab_size")
    if not all(isinstance(one, int) and one > 0 for one in (top_k, vocab_size)):
        raise DataError(f"{columns.folder}: column {name!r} holds no top tokens; write it by columns.scores=teacher")
    assert isinstance(top_k, int) and isinstance(vocab_size, int)
    places, starts = np.full((len(shards), 2), -1, np.int64), shards.shard_starts
    ends = [*starts[1:].tolist(), len(shards)]
    for shard, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        held, digest = _measure_file(columns.folder / array_file(shard), record_type(top_k).itemsize)
        for number in range(start, end):
            if row := columns.read_row(number):
                places[number] = _check_place(columns.folder, row, name, held, digest)
    return TopTokenColumn(columns.folder, name, places, starts, top_k, vocab_size, str(about.get("vocabulary")))


def _measure_file(path: Path, size: int) -> tuple[int, str]:
    """Records in a file, and its SHA-256."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        length = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make the columns again") from error
    if length % size:
        raise DataError(f"{path}: {length} bytes are no whole number of records of {size}; make the columns again")
    return length // size, digest


def _check_place(folder: Path, row: Mapping[str, Any], name: str, held: int, digest: str) -> tuple[int, int]:
    """Where a sample's records are, as its line says."""
    value: Any = row.get(name)
    whole = isinstance(value, list) and len(value) == 3 and all(type(one) is int for one in value[:2])
    if not (whole and min(value[:2]) >= 0 and value[0] + value[1] <= held):
        raise DataError(f"{folder}: key {row[KEY]!r}: column {name!r} is {value!r}, outside of its {held} records")
    if value[2] != digest:
        raise DataError(f"{folder}: key {row[KEY]!r}: the shard's records were changed; make the columns again")
    return value[0], value[1]
