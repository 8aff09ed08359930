"""Views: sets of the samples that were kept of another one, whose shards they refer to."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.building.merge import write_lines
from data_pipelines.errors import DataError
from data_pipelines.filters.judging import Verdicts
from data_pipelines.shards.checksum import hash_file
from data_pipelines.shards.index_file import INDEX, IndexBuilder
from data_pipelines.shards.index_parts import PARTS, IndexParts, format_parts
from data_pipelines.shards.manifest import SHARED, FileInfo, Manifest
from data_pipelines.shards.partial import Partial
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.stats import Stats

DROPPED = "dropped.jsonl"


def name_shards(shards: ShardSet, output: Path) -> list[str]:
    """The names of the shards as the manifest of a view in `output` has them.

    Raises `DataError` unless `output` lies beside the set, or its shards are named by their addresses.
    """
    folder = Path(os.path.abspath(shards.folder))
    names = [info.name if "/" in info.name else f"../{folder.name}/{info.name}" for info in shards.manifest.shards]
    beside = Path(os.path.abspath(output)).parent == folder.parent
    if not shards.manifest.elsewhere and not (beside and all(SHARED.fullmatch(name) for name in names)):
        raise DataError(
            f"output {output} is not a view of {shards.address}: it has to lie beside the set, and the names of the "
            "set and its shards hold only A-Z a-z 0-9 _ - . ; copy=true writes the samples anywhere"
        )
    return names


def write_view(shards: ShardSet, output: Path, verdicts: Verdicts, about: Mapping[str, Any], overwrite: bool) -> None:
    """Write the kept samples of a set with one index as a view. Raises `DataError` as `name_shards` does."""
    names, index = name_shards(shards, output), shards.index
    assert not isinstance(index, IndexParts), "`write_parts_view` is for these"
    used, counts = np.unique(index.shard[verdicts.kept], return_counts=True)
    numbers = np.full(len(names), -1)
    numbers[used] = np.arange(len(used))
    kept = IndexBuilder()
    kept.add_index(index, numbers.tolist(), verdicts.kept)
    infos: list[FileInfo] = [
        replace(shards.manifest.shards[number], name=names[number], samples=count)
        for number, count in zip(used.tolist(), counts.tolist())
    ]
    with _make_folder(output, overwrite) as folder:
        write_lines(folder / DROPPED, verdicts.dropped)
        saved = kept.write_file(folder / INDEX)
        stats = verdicts.stats.to_json()
        Manifest(samples=len(kept), shards=tuple(infos), index=saved, stats=stats, **about).write(folder)


def write_parts_view(
    shards: ShardSet,
    output: Path,
    judged: Iterable[tuple[int, Verdicts]],
    about: Mapping[str, Any],
    overwrite: bool,
) -> Manifest:
    """The same of a set with one index a shard, which the view has, too. Of one shard at a time the verdicts are held.

    Raises `DataError` if no sample is left, too.
    """
    names, index = name_shards(shards, output), shards.index
    assert isinstance(index, IndexParts), "`write_view` is for the others"
    infos, files, stats, dropped = list[FileInfo](), list[FileInfo](), Stats(), Counter[str]()
    with _make_folder(output, overwrite) as folder:
        (folder / "index").mkdir()
        with open(folder / DROPPED, "w", encoding="utf-8") as log:
            for number, verdicts in judged:
                info = shards.manifest.shards[number]
                log.writelines(json.dumps({"shard": info.name} | row) + "\n" for row in verdicts.dropped)
                dropped.update(verdicts.count_dropped())
                if not (count := len(verdicts.kept)):
                    continue
                stats.merge_state(verdicts.stats.export_state())
                kept = IndexBuilder()
                kept.add_index(index.open_part(number), [0], verdicts.kept - index.starts[number])
                saved = kept.write_file(folder / "index" / f"{len(files):06d}.npz")
                files.append(replace(saved, name=f"index/{saved.name}", samples=count))
                infos.append(replace(info, name=names[number], samples=count))
        counts = dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))
        if not infos:
            raise DataError(f"{shards.address}: no sample is left: {counts}")
        (folder / PARTS).write_text(format_parts(files), encoding="utf-8")
        manifest = Manifest(
            samples=sum(info.samples for info in infos),
            shards=tuple(infos),
            index=FileInfo(PARTS, (folder / PARTS).stat().st_size, hash_file(folder / PARTS)),
            stats=stats.to_json(),
            layout=shards.manifest.layout,
            elsewhere=shards.manifest.elsewhere,
            **{**about, "dropped": counts},
        )
        manifest.write(folder)
    return manifest


@contextmanager
def _make_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder, which becomes `output` unless there is an error."""
    with Partial(output, overwrite=overwrite) as hidden:
        try:
            hidden.remove_matching()
            yield hidden.path
            hidden.publish_folder()
        except BaseException:
            hidden.remove_folder()
            raise
