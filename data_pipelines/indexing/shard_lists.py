"""Many shards that others wrote -> a shard set of their indexes, which copies no sample."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.building import engines
from data_pipelines.building.merge import QUARANTINE, count_kinds, write_lines
from data_pipelines.building.progress import Progress
from data_pipelines.errors import DataError, common_reason
from data_pipelines.indexing.addresses import expand_addresses
from data_pipelines.indexing.shard_index import IndexJob, find_record, index_shard
from data_pipelines.shards.checksum import hash_file
from data_pipelines.shards.index_parts import PARTS, format_parts
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import FileInfo, Manifest
from data_pipelines.shards.stats import Stats

MAX_SHOWN = 5  # kinds of unusable samples in an error


def index_shards(
    shards: str | Sequence[str],
    output: Path,
    layout: Layout,
    *,
    max_bad_share: float = 0.1,
    workers: int | None = None,
    engine: str = "local",
    node: int = 0,
    nodes: int = 1,
    **about: Any,
) -> Manifest | None:
    """Index every shard that `shards` names, in parallel, and write the set of them into the folder `output`.

    What was indexed before, by a run that was stopped or by another node, is not read again. Keys have to be unique
    within their shard only, so that no process holds all of them.

    Args:
        max_bad_share: of the samples, those that may be left out.
        node, nodes: index this share of the shards; the same call without them then finishes the set.
        about: further fields of the manifest.

    Returns:
        The set; None where one of several nodes has done its share.

    Raises:
        DataError: a shard cannot be had, or too many samples are unusable.
    """
    if not 0 <= node < nodes:
        raise DataError(f"node: got {node} with nodes={nodes}; allowed: 0 to nodes - 1")
    job = IndexJob(addresses=tuple(expand_addresses(shards)), folder=Path(os.path.abspath(output)), layout=layout)
    (job.folder / "index").mkdir(parents=True, exist_ok=True)
    numbers = range(node, len(job.addresses), nodes)
    missing = [number for number in numbers if find_record(job, number) is None]
    if len(missing) < len(numbers):
        print(f"{output}: {len(numbers) - len(missing)} of {len(numbers)} shards were indexed before")
    results = engines.run_jobs(index_shard, job, missing, workers=workers, engine=engine)
    with closing(results), Progress(str(output), len(missing), "shards") as progress:
        for _, record in results:
            progress.add_records(record.shard.samples + len(record.bad))
    return _write_set(job, max_bad_share, about) if nodes == 1 else None


def note_bad_samples(
    folder: Path, rows: Sequence[dict[str, Any]], samples: int, max_bad_share: float
) -> dict[str, int]:
    """Write `rows` (shard, key and reason of what was left out) into `folder`; returns how many there are by reason.

    Raises `DataError` if they are more than `max_bad_share` of these, and of the `samples` that are used.
    """
    write_lines(folder / QUARANTINE, rows)
    if len(rows) > max_bad_share * (samples + len(rows)):
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(common_reason(row["reason"]), f"\n  {row['shard']}: {row['reason']}")
        raise DataError(
            f"{len(rows)} of {samples + len(rows)} samples are unusable, max_bad_share={max_bad_share:g}; is the "
            f"layout another? All in {folder / QUARANTINE}, first of each kind:"
            + "".join(list(first.values())[:MAX_SHOWN])
        )
    return count_kinds(row["reason"] for row in rows)


def _write_set(job: IndexJob, max_bad_share: float, about: dict[str, Any]) -> Manifest:
    """Index and manifest of the whole set, from the records of its shards, of which one is held at a time."""
    stats, shards, files, bad = Stats(), list[FileInfo](), list[FileInfo](), list[dict[str, Any]]()
    for number in range(len(job.addresses)):
        record = find_record(job, number)
        if record is None:
            raise DataError(
                f"{job.addresses[number]}: it, or its index, has changed since it was indexed; nothing else may write "
                "them meanwhile. The same command reads it again"
            )
        stats.merge_state(record.stats)
        shards.append(record.shard)
        files.append(record.index)
        bad += bad_rows(record.shard.name, record.bad)
    samples = sum(info.samples for info in shards)
    kinds = note_bad_samples(job.folder, bad, samples, max_bad_share)
    with atomic_write(job.folder / PARTS) as file:
        file.write(format_parts(files))
    beside = all(Path(info.name).parent == job.folder for info in shards)
    manifest = Manifest(
        samples=samples,
        shards=tuple(replace(info, name=Path(info.name).name) for info in shards) if beside else tuple(shards),
        index=FileInfo(PARTS, (job.folder / PARTS).stat().st_size, hash_file(job.folder / PARTS)),
        command="index",
        stats=stats.to_json(),
        bad=kinds,
        layout=job.layout.to_json(),
        elsewhere=not beside,
        **about,
    )
    manifest.write(job.folder)
    return manifest


def bad_rows(shard: str, bad: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The lines of `quarantine.jsonl` for a shard of which these keys were left out, for these reasons."""
    return [{"shard": shard, "key": key, "reason": reason} for key, reason in bad]
