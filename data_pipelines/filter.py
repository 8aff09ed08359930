"""Filter a shard set: `python -m data_pipelines.filter folder=<set> output=<new set> filter=[<name>,...] [filters.<name>.<option>=value ...]`

The filters are asked in the order given. The result is a view beside the set: an index of the samples that were kept,
and a manifest that refers to the shards where they are; `copy=true` writes shards instead. `dropped.jsonl` holds every
sample that was dropped, with the filter and its reason; samples that cannot be read are dropped, too.
"""  # noqa: E501

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data_pipelines.building import engines
from data_pipelines.building.merge import write_lines
from data_pipelines.building.progress import Progress
from data_pipelines.cli import CONF, check_same, make_component, run_command
from data_pipelines.errors import BadSample, DataError, common_reason
from data_pipelines.filters import Drop, Filter
from data_pipelines.shards.index_file import INDEX, IndexBuilder
from data_pipelines.shards.index_parts import IndexParts
from data_pipelines.shards.manifest import MANIFEST, SHARED, FileInfo, Manifest
from data_pipelines.shards.partial import Partial
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.stats import Stats, measure_lengths
from data_pipelines.shards.tar_writer import MAX_SHARD_BYTES, SAMPLES_PER_SHARD, ShardWriter

DROPPED = "dropped.jsonl"
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


def judge_samples(shards: ShardSet, filters: Mapping[str, Filter], *, workers: int | None = 1) -> Verdicts:
    """Ask `filters` about every sample: measured in parallel, judged in order."""
    kept, stats, dropped = list[int](), Stats(), list[dict[str, str]]()
    chunks = range(-(-len(shards) // CHUNK))
    results = engines.run_jobs(_measure_chunk, (shards, list(filters.values())), chunks, workers=workers)
    with closing(results), Progress(str(shards.folder), len(chunks), "chunks") as progress:
        for i, looked in enumerate(_iterate_samples(engines.in_order(results), progress)):
            if found := _judge_sample(filters, shards.key(i), looked):
                dropped.append({"key": shards.key(i), "filter": found[0], "reason": found[1]})
            else:
                kept.append(i)
                stats.add_lengths(looked.lengths)
    return Verdicts(kept=np.array(kept, dtype=np.int64), stats=stats, dropped=dropped)


def write_view(shards: ShardSet, output: Path, verdicts: Verdicts, about: Mapping[str, Any], overwrite: bool) -> None:
    """Write the kept samples as a view. Raises `DataError` unless `output` lies beside the set."""
    folder = Path(os.path.abspath(shards.folder))
    names = [info.name if "/" in info.name else f"../{folder.name}/{info.name}" for info in shards.manifest.shards]
    beside = Path(os.path.abspath(output)).parent == folder.parent
    index = shards.index
    if isinstance(index, IndexParts):
        raise DataError(
            f"{shards.address}: has one index a shard, of which no view is made; copy=true writes the samples"
        )
    if not beside or not all(SHARED.fullmatch(name) for name in names):
        raise DataError(
            f"output {output} is not a view of {shards.address}: it has to lie beside the set, and the names of the "
            "set and its shards hold only A-Z a-z 0-9 _ - . ; copy=true writes the samples anywhere"
        )
    used, counts = np.unique(index.shard[verdicts.kept], return_counts=True)
    numbers = np.full(len(names), -1)
    numbers[used] = np.arange(len(used))
    kept = IndexBuilder()
    kept.add_index(index, numbers.tolist(), verdicts.kept)
    infos: list[FileInfo] = [
        replace(shards.manifest.shards[number], name=names[number], samples=count)
        for number, count in zip(used.tolist(), counts.tolist())
    ]
    with Partial(output, overwrite=overwrite) as hidden:
        try:
            hidden.remove_matching()
            write_lines(hidden.path / DROPPED, verdicts.dropped)
            saved = kept.write_file(hidden.path / INDEX)
            stats = verdicts.stats.to_json()
            Manifest(samples=len(kept), shards=tuple(infos), index=saved, stats=stats, **about).write(hidden.path)
            hidden.publish_folder()
        except BaseException:
            hidden.remove_folder()
            raise


def write_copy(
    shards: ShardSet,
    output: Path,
    verdicts: Verdicts,
    about: Mapping[str, Any],
    overwrite: bool,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the kept samples as shards."""
    with ShardWriter(
        output, samples_per_shard=samples_per_shard, max_bytes=max_shard_bytes, overwrite=overwrite
    ) as writer:
        writer.about.update(about)
        write_lines(writer.partial / DROPPED, verdicts.dropped)
        with Progress(str(output), len(verdicts.kept), "samples") as progress:
            for i in verdicts.kept.tolist():
                writer.write_sample(*shards.load_sample(i))
                progress.add_records(1)


def filter_set(config: DictConfig) -> int:
    """Filter what the composed `config` says; returns the exit code."""
    output, shards = Path(config.output), ShardSet(config.folder)
    nodes: dict[str, dict[str, Any]] = OmegaConf.to_container(config, resolve=True).get("filters", {})  # type: ignore
    filters = {
        name: make_component(options, ("data_pipelines.", *config.allow_targets), at=f"filters.{name}.")
        for name, options in nodes.items()
    }
    if not filters:
        raise DataError("filter: none is given; filter=[<name>,...], see --help")
    if any(output.resolve() == folder for folder in _read_from(shards)):
        raise DataError(f"output: {output} is a folder whose shards the result is made of; choose another")
    arguments = _manifest_arguments(config, nodes)
    if (output / MANIFEST).is_file() and not config.force:
        check_same(output, arguments)
        print(f"{output}: already filtered ({len(ShardSet(output))} samples); force=true filters again")
        return 0
    verdicts = judge_samples(shards, filters, workers=config.workers)
    if not len(verdicts.kept):
        raise DataError(f"{config.folder}: no sample is left: {verdicts.count_dropped()}")
    origin = shards.manifest
    about: dict[str, Any] = {name: getattr(origin, name) for name in ("source", "license", "split", "bad")}
    about |= {"command": "filter", "build": arguments, "dropped": verdicts.count_dropped()}
    if config["copy"]:
        limits = (config.samples_per_shard, config.max_shard_bytes)
        write_copy(shards, output, verdicts, about, config.force, *limits)
    else:
        write_view(shards, output, verdicts, about, config.force)
    others = f"; the others, in {output / DROPPED}:" if verdicts.dropped else ""
    print(f"{output}: {len(verdicts.kept)} of {len(shards)} samples kept{others}")
    for reason, count in verdicts.count_dropped().items():
        print(f"  {count:>8}  {reason}")
    return 0


def _read_from(shards: ShardSet) -> set[Path]:
    """The folders of a set and of its shards."""
    return {shards.folder.resolve(), *((shards.folder / info.name).resolve().parent for info in shards.manifest.shards)}


def _manifest_arguments(config: DictConfig, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the set is made by, named as on the command line."""
    names = [name for name in nodes if (CONF / "filter" / f"{name}.yaml").is_file()]
    arguments: dict[str, Any] = {"folder": str(config.folder), "filter": names}
    for name, options in nodes.items():
        for option, value in options.items():
            if option != "_target_" or name not in names:
                known = name in names and not isinstance(value, dict)
                inside = value if isinstance(value, dict) else {"": value}
                for key, item in inside.items():
                    full = ".".join(word for word in ("filters", name, option, key) if word)
                    arguments[full if known else f"++{full}"] = item
    if config["copy"]:
        arguments |= {key: config[key] for key in ("copy", "samples_per_shard", "max_shard_bytes")}
    return arguments


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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(filter_set, "filter", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
