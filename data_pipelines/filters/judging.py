"""What filters say of every sample of a set: measured in parallel, judged in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np

from data_pipelines.building import engines
from data_pipelines.building.progress import Progress
from data_pipelines.errors import BadSample, common_reason
from data_pipelines.filters import Drop, Filter
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.stats import Stats, measure_lengths

CHUNK = 64  # samples that a process looks at before it answers
READ = "read"  # in place of a filter's name where a sample cannot be read


@dataclass(frozen=True, slots=True)
class Looked:
    """What a process saw of one sample: a value per filter up to the first that drops it, or why it is unreadable."""

    measured: Sequence[Any]
    lengths: Sequence[tuple[str, float]] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Numbers of the kept samples with their stats; key, filter and reason of the others."""

    kept: np.ndarray
    stats: Stats
    dropped: list[dict[str, str]]

    def count_dropped(self) -> dict[str, int]:
        """Dropped samples by filter and reason."""
        rows = ((r["filter"], common_reason(r["reason"]) if r["filter"] == READ else r["reason"]) for r in self.dropped)
        counts = Counter(f"{name}: {reason}" for name, reason in rows)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


Judged: TypeAlias = tuple[int, Looked, dict[str, str] | None]


def judge_samples(shards: ShardSet, filters: Mapping[str, Filter], *, workers: int | None = 1) -> Verdicts:
    """Ask `filters` about every sample of a set."""
    with closing(_judge_each(shards, filters, workers)) as judged:
        return _collect_verdicts(judged)


def judge_shards(
    shards: ShardSet, filters: Mapping[str, Filter], *, workers: int | None = 1
) -> Generator[tuple[int, Verdicts], None, None]:
    """The same shard by shard: the number of each that holds samples, and the verdicts on these. Close it if you leave
    it early."""
    with closing(_judge_each(shards, filters, workers)) as judged:
        for shard, found in groupby(judged, key=lambda one: shards.index.find_shard(one[0])):
            yield shard, _collect_verdicts(found)


def _judge_each(shards: ShardSet, filters: Mapping[str, Filter], workers: int | None) -> Generator[Judged, None, None]:
    """Every sample in order: its number, what was seen of it, and the line of `dropped.jsonl` if it is dropped."""
    chunks = range(-(-len(shards) // CHUNK))
    results = engines.run_jobs(_measure_chunk, (shards, list(filters.values())), chunks, workers=workers)
    with closing(results), Progress(str(shards.folder), len(chunks), "chunks") as progress:
        for i, looked in enumerate(_iterate_samples(engines.in_order(results), progress)):
            found = _judge_sample(filters, key := shards.key(i), looked)
            yield i, looked, {"key": key, "filter": found[0], "reason": found[1]} if found else None


def _collect_verdicts(judged: Iterable[Judged]) -> Verdicts:
    kept, stats, dropped = list[int](), Stats(), list[dict[str, str]]()
    for i, looked, row in judged:
        if row:
            dropped.append(row)
        else:
            kept.append(i)
            stats.add_lengths(looked.lengths)
    return Verdicts(kept=np.array(kept, dtype=np.int64), stats=stats, dropped=dropped)


def _measure_chunk(shared: tuple[ShardSet, list[Filter]], chunk: int) -> list[Looked]:
    shards, filters = shared
    return [_measure_sample(shards, filters, i) for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(shards)))]


def _measure_sample(shards: ShardSet, filters: Sequence[Filter], i: int) -> Looked:
    try:
        sample, blobs = shards.load_sample(i)
        measured: list[Any] = []
        for one in filters:
            measured.append(one.measure(sample, blobs))
            if isinstance(measured[-1], Drop):
                break
        return Looked(measured, measure_lengths(sample, blobs))
    except BadSample as error:
        return Looked((), error=str(error))


def _iterate_samples(chunks: Iterator[list[Looked]], progress: Progress) -> Iterator[Looked]:
    for chunk in chunks:
        yield from chunk
        progress.add_records(len(chunk))


def _judge_sample(filters: Mapping[str, Filter], key: str, looked: Looked) -> tuple[str, str] | None:
    if looked.error:
        return READ, looked.error
    for (name, one), value in zip(filters.items(), looked.measured):
        reason = value if isinstance(value, Drop) else one.verdict(key, value)
        if reason:
            return name, str(reason)
    return None
