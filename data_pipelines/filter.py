"""Filter a shard set: `python -m data_pipelines.filter folder=<set> output=<new set> filter=[<name>,...] [filters.<name>.<option>=value ...]`

The filters are asked in the order given. The result is a view beside the set: an index of the samples that were kept,
and a manifest that refers to the shards where they are; `copy=true` writes shards instead. `dropped.jsonl` holds every
sample that was dropped, with the filter and its reason; samples that cannot be read are dropped, too. The view of a set
with one index a shard has one a shard, too.
"""  # noqa: E501

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.building.merge import write_lines
from data_pipelines.building.progress import Progress
from data_pipelines.cli import CONF, check_same, make_component, run_command
from data_pipelines.errors import DataError
from data_pipelines.filters import Filter
from data_pipelines.filters.judging import Verdicts, judge_samples, judge_shards
from data_pipelines.filters.views import DROPPED, name_shards, write_parts_view, write_view
from data_pipelines.shards.index_parts import IndexParts
from data_pipelines.shards.manifest import MANIFEST
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import MAX_SHARD_BYTES, SAMPLES_PER_SHARD, ShardWriter


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
    about: dict[str, Any] = {name: getattr(shards.manifest, name) for name in ("source", "license", "split", "bad")}
    about |= {"command": "filter", "build": arguments}
    kept, dropped = _write_kept(shards, filters, output, about, config)
    others = f"; the others, in {output / DROPPED}:" if dropped else ""
    print(f"{output}: {kept} of {len(shards)} samples kept{others}")
    for reason, count in dropped.items():
        print(f"  {count:>8}  {reason}")
    return 0


def _write_kept(
    shards: ShardSet, filters: Mapping[str, Filter], output: Path, about: dict[str, Any], config: DictConfig
) -> tuple[int, Mapping[str, int]]:
    """Ask the filters and write the samples that they keep; returns how many, and the others by reason."""
    if not config["copy"]:
        name_shards(shards, output)  # raises before hours of work
        if isinstance(shards.index, IndexParts):
            with closing(judge_shards(shards, filters, workers=config.workers)) as judged:
                manifest = write_parts_view(shards, output, judged, about, config.force)
            return manifest.samples, manifest.dropped
    verdicts = judge_samples(shards, filters, workers=config.workers)
    dropped = verdicts.count_dropped()
    if not len(verdicts.kept):
        raise DataError(f"{config.folder}: no sample is left: {dropped}")
    about["dropped"] = dropped
    if config["copy"]:
        limits = (config.samples_per_shard, config.max_shard_bytes)
        write_copy(shards, output, verdicts, about, config.force, *limits)
    else:
        write_view(shards, output, verdicts, about, config.force)
    return len(verdicts.kept), dropped


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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(filter_set, "filter", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
