"""Build a shard set: `python -m data_pipelines.build source=<name> output=<folder> [option=value ...]`

A finished set with the same arguments is left alone. An interrupted build leaves nothing under the output's name.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from data_pipelines.cli import run
from data_pipelines.errors import BadSample, DataError
from data_pipelines.manifest import MANIFEST, Manifest
from data_pipelines.shards import ShardWriter
from data_pipelines.sources import Record, Source, records
from data_pipelines.stream import ShardSet

QUARANTINE = "quarantine.jsonl"
RUNNING = ("output", "force", "max_bad", "allow_targets")  # options that do not change what a finished set holds
WRITER = ("samples_per_shard", "max_shard_bytes")
PLAIN_SECONDS = 10.0  # between progress lines when the output is no terminal


def build(config: DictConfig) -> int:
    """Build what the composed `config` describes; returns the exit code."""
    output = Path(config.output)
    arguments: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    arguments = {name: value for name, value in arguments.items() if name not in RUNNING}
    if (output / MANIFEST).is_file() and not config.force:
        _check_same(output, arguments)
        print(f"{output}: already built ({len(ShardSet(output))} samples); force=true builds it again")
        return 0
    start = time.perf_counter()
    source = _source(arguments, ("data_pipelines.", *config.allow_targets))
    manifest, bad = write(
        source,
        output,
        build=arguments,
        samples_per_shard=config.samples_per_shard,
        max_shard_bytes=config.max_shard_bytes,
        max_bad=config.max_bad,
        overwrite=config.force,
    )
    skipped = f", {bad} bad records in {output / QUARANTINE}" if bad else ""
    seconds = time.perf_counter() - start
    size = f"{manifest.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    print(f"{output}: {manifest.samples} samples, {size}, {seconds:.1f} s{skipped}")
    return 0


def write(
    source: Source,
    output: Path,
    *,
    build: dict[str, Any] | None = None,
    samples_per_shard: int = 1000,
    max_shard_bytes: int = 256 * 2**20,
    max_bad: int = 100,
    overwrite: bool = False,
) -> tuple[Manifest, int]:
    """Write all records of `source`; returns the manifest and the number of bad records.

    Bad records go to `quarantine.jsonl` in the output, or, when more than `max_bad` of them stop the build with a
    `DataError`, to `<output>.quarantine.jsonl`.
    """
    writer = ShardWriter(
        output,
        source=source.name,
        licence=source.licence,
        split=source.split,
        build=build,
        samples_per_shard=samples_per_shard,
        max_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    bad: list[str] = []
    with writer:
        for number, record in enumerate(_progress(source, str(output))):
            try:
                if isinstance(record, BadSample):
                    raise record
                writer.write(*record)
            except BadSample as error:
                bad.append(json.dumps({"record": number, "reason": str(error)}))
                if len(bad) > max_bad:
                    report = output.with_name(f"{output.name}.{QUARANTINE}")
                    _write_lines(report, bad)
                    raise DataError(_too_many(bad, max_bad, number + 1, report)) from error
        if bad:
            _write_lines(writer.partial / QUARANTINE, bad)
    return Manifest.read(output), len(bad)


def _source(arguments: dict[str, Any], trusted: tuple[str, ...]) -> Source:
    options = {name: value for name, value in arguments.items() if name not in (*WRITER, "source")}
    target = str(options.get("_target_", ""))
    if not target.startswith(trusted):
        raise DataError(
            f"_target_: {target!r} is not trusted; allowed prefixes: {', '.join(trusted)} (allow_targets=[...])"
        )
    component = get_class(str(options.pop("_target_")))
    known = inspect.signature(component).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(f"{target} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    return component(**options)


def _check_same(output: Path, arguments: dict[str, Any]) -> None:
    built = Manifest.read(output).build
    names = sorted({*built, *arguments})
    differing = [
        f"{n}: {built.get(n)!r} there, {arguments.get(n)!r} now" for n in names if built.get(n) != arguments.get(n)
    ]
    if differing:
        raise DataError(
            f"{output} holds a shard set built otherwise ({'; '.join(differing)}); choose another output or force=true"
        )


def _too_many(bad: list[str], max_bad: int, records: int, report: Path) -> str:
    reasons = "\n".join(f"  record {r['record']}: {r['reason']}" for r in map(json.loads, bad[:3]))
    return f"{len(bad)} bad records among the first {records}, max_bad={max_bad}; all in {report}, first:\n{reasons}"


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _progress(source: Source, name: str) -> Iterator[Record]:
    """A bar on a terminal; elsewhere a line now and then."""
    if sys.stderr.isatty():
        parts = track(range(source.parts), description=name, console=Console(stderr=True))
        for part in parts:
            yield from source.read(part)
        return
    last = time.monotonic()
    for number, record in enumerate(records(source)):
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            print(f"{name}: {number} records", file=sys.stderr, flush=True)
        yield record


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    signal.signal(signal.SIGTERM, _interrupt)  # a batch system's SIGTERM cleans up like Ctrl-C
    return run(build, "build", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
