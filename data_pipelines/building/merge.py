"""Parts -> set: shards are numbered through in the order of the parts; index and manifest are written last.

Everything here may be interrupted and done again: what is moved where follows from the parts alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from data_pipelines.building.parts import Part, part_folder
from data_pipelines.errors import DataError, common_reason
from data_pipelines.shards.index_file import INDEX, Index, IndexBuilder
from data_pipelines.shards.manifest import FileInfo, Manifest
from data_pipelines.shards.stats import Stats
from data_pipelines.shards.tar_writer import shard_name

QUARANTINE = "quarantine.jsonl"
MAX_KINDS = 50  # of bad records, that the manifest tells apart


class BadRecords(DataError):
    """A build failed for its records: parts that hold bad ones are not kept, so that they are read again."""


def find_duplicates(folder: Path, parts: int) -> dict[int, frozenset[str]]:
    """The duplicate keys by part number: keys that an earlier part has."""
    seen: set[str] = set()
    found = {}
    for number in range(parts):
        keys = set(Index.load(part_folder(folder, number) / INDEX).keys())
        if again := keys & seen:
            found[number] = frozenset(again)
        seen |= keys
    return found


def merge_parts(folder: Path, parts: Sequence[Part], about: Mapping[str, Any]) -> Manifest:
    """Make the set of all `parts` in `folder`; `about` are further fields of its manifest."""
    index, stats, shards = IndexBuilder(), Stats(), list[FileInfo]()
    for number, part in enumerate(parts):
        own = part_folder(folder, number)
        names = range(len(shards), len(shards) + len(part.shards))
        index.add_index(Index.load(own / INDEX), names)
        stats.merge_state(part.stats)
        shards += [_move_tar(own, folder / shard_name(n), info) for n, info in zip(names, part.shards, strict=True)]
    rows = bad_rows(dict(enumerate(parts)))
    if rows:
        write_lines(folder / QUARANTINE, rows)
    manifest = Manifest(
        samples=len(index),
        shards=tuple(shards),
        index=index.write_file(folder / INDEX),
        stats=stats.to_json(),
        bad=count_kinds(row["reason"] for row in rows),
        skipped=dict(sum((Counter(part.skipped) for part in parts), Counter()).most_common(MAX_KINDS)),
        **about,
    )
    manifest.write(folder)
    return manifest


def bad_rows(parts: Mapping[int, Part], *, empty: bool = True) -> list[dict[str, Any]]:
    """The lines of `quarantine.jsonl`: part, number of the record in it, and reason; those of `empty` records, too."""
    return [
        {"part": n, "record": i, "reason": reason}
        for n in sorted(parts)
        for i, reason in parts[n].bad
        if empty or i not in parts[n].empty
    ]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def count_kinds(reasons: Iterable[str]) -> dict[str, int]:
    """How often each kind of reason occurs, the most frequent first."""
    counts = Counter(map(common_reason, reasons))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[MAX_KINDS:])
    return dict(ordered[:MAX_KINDS]) | ({"other": rest} if rest else {})


def _move_tar(own: Path, target: Path, info: FileInfo) -> FileInfo:
    if (own / info.name).exists():
        (own / info.name).rename(target)
    elif not target.is_file():
        raise DataError(f"{own / info.name}: missing; remove {target.parent} and build again")
    return replace(info, name=target.name)
