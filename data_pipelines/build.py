"""Build a shard set: `python -m data_pipelines.build source=<name> output=<folder> [option=value ...]`

A finished set with the same arguments is left alone. Every part of the source is written alone by one of `workers`
processes into a hidden folder beside the output; when all are there they become the set, which is the same to the byte
whatever the number of workers, nodes and interruptions. After an interruption or an error the same command goes on with
the finished parts; other arguments throw them away.

Several machines with a shared file system: `node=<0, 1, ...> nodes=<n>` builds one share of the parts and stops. The
same command without them then builds what is missing and finishes the set. On SLURM:

    job=$(sbatch --parsable --array=0-15 --wrap 'python -m data_pipelines.build <arguments> nodes=16 node=$SLURM_ARRAY_TASK_ID')
    sbatch --dependency=afterany:$job --wrap 'python -m data_pipelines.build <arguments>'
"""  # noqa: E501

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.atomic_write import atomic_write
from data_pipelines.building import engines
from data_pipelines.building.merge import QUARANTINE, BadRecords, bad_rows, find_duplicates, merge_parts, write_lines
from data_pipelines.building.parts import PART, Part, PartWriter, part_folder, write_part
from data_pipelines.building.progress import Progress
from data_pipelines.cli import check_same, make_component, run_command
from data_pipelines.errors import DataError
from data_pipelines.sample import SCHEMA_VERSION
from data_pipelines.shards.manifest import MANIFEST, Manifest
from data_pipelines.shards.partial import Partial
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import MAX_SHARD_BYTES, SAMPLES_PER_SHARD
from data_pipelines.sources import Source

PLAN = "plan.json"
NODES = "nodes"  # marks a hidden folder whose parts come from several nodes: what finishes them discards none
RUNNING = ("output", "force", "max_bad", "allow_targets", "workers", "engine", "node", "nodes")
"""Options that do not change what a finished set holds."""
WRITER = ("samples_per_shard", "max_shard_bytes")


def build_shards(config: DictConfig) -> int:
    """Build what the composed `config` describes; returns the exit code."""
    output = Path(config.output)
    arguments: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    arguments = {name: value for name, value in arguments.items() if name not in RUNNING}
    if (output / MANIFEST).is_file() and not config.force:
        check_same(output, arguments)
        print(f"{output}: already built ({len(ShardSet(output))} samples); force=true builds it again")
        return 0
    start = time.perf_counter()
    manifest = write_shards(
        _make_source(arguments, ("data_pipelines.", *config.allow_targets)),
        output,
        build=arguments,
        samples_per_shard=config.samples_per_shard,
        max_shard_bytes=config.max_shard_bytes,
        max_bad=config.max_bad,
        overwrite=config.force,
        workers=config.workers,
        engine=config.engine,
        node=config.node,
        nodes=config.nodes,
    )
    seconds = time.perf_counter() - start
    if manifest is None:
        print(
            f"{output}: share {config.node} of {config.nodes} done, {seconds:.1f} s; without node= the set is finished"
        )
        return 0
    size = f"{manifest.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    print(f"{output}: {manifest.samples} samples, {size}, {seconds:.1f} s")
    if manifest.bad:
        print(f"{sum(manifest.bad.values())} records left out, see {output / QUARANTINE}:")
        print("\n".join(f"  {count:>8}  {reason}" for reason, count in manifest.bad.items()))
    if manifest.skipped:
        lines = [f"{sum(manifest.skipped.values())} questions, captions or regions left out of samples:"]
        print("\n".join([*lines, *(f"  {count:>8}  {reason}" for reason, count in manifest.skipped.items())]))
    return 0


def write_shards(
    source: Source,
    output: Path,
    *,
    build: Mapping[str, Any] | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_bad: int = 100,
    overwrite: bool = False,
    workers: int | None = 1,
    engine: str = "local",
    node: int = 0,
    nodes: int = 1,
) -> Manifest | None:
    """Write all records of `source`; returns the manifest, or `None` where `node` of several wrote its share.

    A shard holds records of one part. What an interrupted call with the same `build` finished is not written again. Bad
    records go to `quarantine.jsonl` in the output, or, when more than `max_bad` of them stop the build with a
    `DataError`, to `<output>.quarantine.jsonl`.
    """
    _check_arguments(source, node, nodes)
    with Partial(output, overwrite=overwrite, shared=nodes > 1) as hidden:
        writer = PartWriter(
            source=source,
            folder=hidden.path,
            samples_per_shard=samples_per_shard,
            max_shard_bytes=max_shard_bytes,
            max_bad=max_bad,
        )
        numbers = range(node, source.parts, nodes)
        _open_hidden_folder(hidden, _describe_plan(writer, build), numbers, shared=nodes > 1, overwrite=overwrite)
        about = {"source": source.name, "license": source.license, "split": source.split, "build": dict(build or {})}
        try:
            if not (hidden.path / MANIFEST).is_file():  # else only the last renaming was missing
                parts = _write_missing(writer, numbers, output, workers, engine)
                if nodes > 1:
                    return None
                parts |= _write_again(writer, parts, output, workers, engine)
                _require_samples(parts, output)
                merge_parts(hidden.path, [parts[number] for number in numbers], about)
            hidden.remove_matching("part-*")
            hidden.publish_folder()
            for name in (PLAN, NODES):  # until then they say what the hidden folder holds
                (hidden.folder / name).unlink(missing_ok=True)
            _bad_records_path(output).unlink(missing_ok=True)
        except BaseException as error:
            _keep_finished(hidden, numbers, error, shared=nodes > 1)
            raise
    return Manifest.read(output)


def _check_arguments(source: Source, node: int, nodes: int) -> None:
    """Raise `DataError` for a node that is none of `nodes`, and for a source that lacks what `Source` names."""
    if not 0 <= node < nodes:
        raise DataError(f"node: got {node} with nodes={nodes}; allowed: 0 to nodes - 1")
    if lacking := [name for name in ("name", "license", "split", "parts", "read") if not hasattr(source, name)]:
        raise DataError(f"{type(source).__name__} has no {', '.join(lacking)}; see `data_pipelines.sources.Source`")


def _require_samples(parts: Mapping[int, Part], output: Path) -> None:
    if not any(part.samples for part in parts.values()):
        raise _too_many("the source gave no usable sample", bad_rows(parts), parts, output)


def _make_source(arguments: dict[str, Any], trusted: tuple[str, ...]) -> Source:
    options = {name: value for name, value in arguments.items() if name not in (*WRITER, "source")}
    return make_component(options, trusted)


def _describe_plan(writer: PartWriter, build: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must not change while a set is built."""
    source = writer.source
    plan = {
        "build": dict(build or {}),
        "source": [source.name, source.license, source.split, source.parts],
        "shards": [writer.samples_per_shard, writer.max_shard_bytes],
        "sample_version": SCHEMA_VERSION,
    }
    return json.loads(json.dumps(plan))


def _open_hidden_folder(
    hidden: Partial, plan: dict[str, Any], numbers: Sequence[int], *, shared: bool, overwrite: bool
) -> None:
    """Take up the hidden folder if it was begun with the same plan, else, or with `overwrite`, begin it."""
    path = hidden.path / PLAN
    if shared:
        (hidden.path / NODES).touch()
    elif overwrite and not (hidden.path / NODES).exists() and not (hidden.path / MANIFEST).is_file():
        hidden.remove_matching()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if found == plan:
        _clear_half_written(hidden, numbers, shared=shared)
        return
    if found is not None and shared:
        raise DataError(f"{hidden.path} holds parts of a build with other arguments; finish that one or remove it")
    if found is not None:
        print(f"{hidden.path}: finished parts of a build with other arguments are deleted", file=sys.stderr)
    if not shared:
        hidden.remove_matching()
    with atomic_write(path) as file:
        json.dump(plan, file)


def _write_missing(
    writer: PartWriter, numbers: Sequence[int], output: Path, workers: int | None, engine: str
) -> dict[int, Part]:
    folders = {number: part_folder(writer.folder, number) for number in numbers}
    parts = {number: Part.read(folder) for number, folder in folders.items() if (folder / PART).is_file()}
    if parts:
        print(f"{output}: going on with {len(parts)} of {len(numbers)} parts found in {writer.folder}", file=sys.stderr)
    missing = [number for number in numbers if number not in parts]
    return _write_parts(writer, missing, parts, output, workers, engine)


def _write_parts(
    writer: PartWriter, numbers: Sequence[int], parts: dict[int, Part], output: Path, workers: int | None, engine: str
) -> dict[int, Part]:
    """Write the parts `numbers`; returns them with those of `parts` that were there. Raises if too many are bad."""
    parts, bad = dict(parts), sum(part.unusable for part in parts.values())
    results = engines.run_jobs(write_part, writer, numbers, workers=workers, engine=engine)
    with closing(results), Progress(str(output), len(numbers), "parts") as progress:
        for number, part in results:
            parts[number] = part
            bad += part.unusable
            progress.add_records(part.records)
            if bad > writer.max_bad:
                break
    if bad > writer.max_bad:
        raise _too_many(f"max_bad={writer.max_bad}", bad_rows(parts, empty=False), parts, output)
    return parts


def _write_again(
    writer: PartWriter, parts: dict[int, Part], output: Path, workers: int | None, engine: str
) -> dict[int, Part]:
    """Parts with keys of an earlier part, written without them."""
    refused = find_duplicates(writer.folder, len(parts))
    if not refused:
        return {}
    again = [
        {"part": number, "record": None, "reason": f"sample {key!r}: duplicate key, also in an earlier part"}
        for number, keys in refused.items()
        for key in sorted(keys)
    ]
    if len(rows := bad_rows(parts, empty=False) + again) > writer.max_bad:
        raise _too_many(f"max_bad={writer.max_bad}", rows, parts, output)
    kept = {number: part for number, part in parts.items() if number not in refused}
    return _write_parts(replace(writer, refused=refused), list(refused), kept, output, workers, engine)


def _too_many(why: str, rows: list[dict[str, Any]], parts: Mapping[int, Part], output: Path) -> BadRecords:
    records = sum(part.records for part in parts.values())
    if not rows:
        return BadRecords(f"{output}: {why}: it has no records")
    report = _bad_records_path(output)
    write_lines(report, rows)
    first = "\n".join(f"  part {row['part']}, record {row['record']}: {row['reason']}" for row in rows[:3])
    return BadRecords(f"{len(rows)} bad records among {records}, {why}; all in {report}, first:\n{first}")


def _remove_bad_parts(hidden: Partial, numbers: Sequence[int]) -> None:
    """Remove the parts of this call that hold bad records."""
    for number in numbers:
        folder = part_folder(hidden.path, number)
        if (folder / PART).is_file() and Part.read(folder).bad:
            shutil.rmtree(folder)


def _bad_records_path(output: Path) -> Path:
    """The path of the list of bad records that stopped a build."""
    return output.with_name(f"{output.name}.{QUARANTINE}")


def _clear_half_written(hidden: Partial, numbers: Sequence[int], *, shared: bool) -> None:
    for pattern in [f"part-{number:06d}.*" for number in numbers] if shared else ["part-??????.*"]:
        hidden.remove_matching(pattern)


def _keep_finished(hidden: Partial, numbers: Sequence[int], error: BaseException, *, shared: bool) -> None:
    """After an error: say what is kept, or leave nothing."""
    if isinstance(error, BadRecords):
        _remove_bad_parts(hidden, numbers)
    _clear_half_written(hidden, numbers, shared=shared)
    kept = sum(part_folder(hidden.path, number).is_dir() for number in numbers)
    if kept:
        where = f"{kept} of {len(numbers)} parts are finished and kept in {hidden.path}"
        print(f"{where}; the same command continues with them", file=sys.stderr)
    elif not shared and not (hidden.path / MANIFEST).is_file():
        hidden.remove_folder()


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """The command line. A batch system's SIGTERM stops it like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        return run_command(build_shards, "build", __doc__ or "", argv)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
