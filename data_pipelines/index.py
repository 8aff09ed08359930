"""Make a shard set of other programs' tars: `python -m data_pipelines.index folder=<folder>`, or, for many,
`python -m data_pipelines.index shards='<addresses>' output=<folder>`

Index and manifest are written beside the tars, or into `output`; the tars stay as they are. Consecutive members
`<key>.<name>` are a sample, a picture or video with a `.txt` is a caption. The index says where every member of every
sample lies, so that sample i is one read away. Samples that cannot be used are left out, and named in
`quarantine.jsonl`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from data_pipelines.building.merge import QUARANTINE
from data_pipelines.errors import DataError
from data_pipelines.indexing.addresses import list_tars
from data_pipelines.indexing.shard_index import FoundSamples, describe_shard, open_shard
from data_pipelines.indexing.shard_lists import bad_rows, index_shards, note_bad_samples
from data_pipelines.shards.index_file import INDEX
from data_pipelines.shards.layout import Layout, OwnLayout
from data_pipelines.shards.manifest import MANIFEST, FileInfo, Manifest


def index_folder(
    folder: Path, *, max_bad_share: float = 0.1, source: str = "", license: str = "", split: str = ""
) -> Manifest:
    """Read every `*.tar` of `folder` once, check it, and write index and manifest beside them.

    Samples that cannot be used are left out and noted, as `index_shards` does. Raises `DataError` for too many.
    """
    found, shards, bad, tars = FoundSamples(), list[FileInfo](), list[dict[str, Any]](), list_tars(folder)
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder}: cannot be written to; shards={folder} output=<another folder> writes elsewhere")
    for number, path in enumerate(tars):
        before = len(found.index)
        with open_shard(str(path)) as file:
            for _ in found.read_samples(file, OwnLayout(), number):
                pass
            shards.append(describe_shard(path.name, file, len(found.index) - before))
        bad += bad_rows(str(path), found.bad[len(bad) :])
    manifest = Manifest(
        samples=len(found.index),
        shards=tuple(shards),
        bad=note_bad_samples(folder, bad, len(found.index), max_bad_share),
        index=found.index.write_file(folder / INDEX),
        source=source,
        license=license,
        split=split,
        command="index",
        stats=found.stats.to_json(),
    )
    manifest.write(folder)
    return manifest


def _index_list(config: Any, output: Path, about: dict[str, str]) -> Manifest | None:
    """`shards=`: one index a shard."""
    shards = config.shards if isinstance(config.shards, str) else list(config.shards)
    options: dict[str, Any] = {name: config[name] for name in ("max_bad_share", "workers", "engine", "node", "nodes")}
    layout = Layout.from_json({str(name): value for name, value in config.layout.items()})
    if config.force:
        for record in (output / "index").glob("*.json"):
            record.unlink()
    return index_shards(shards, output, layout, **options | about)


def _check_options(config: Any) -> None:
    """Raise `DataError` unless the options are those of `folder=` or of `shards=`."""
    if (config.folder is None) == (config.shards is None):
        raise DataError("give folder=<a folder of tars> or shards=<addresses of tars>")
    if config.shards is not None and config.output is None:
        raise DataError("shards: needs output=<folder>, which takes the indexes; the shards stay where they are")
    given = {"output": config.output is not None, "layout": Layout.from_option(dict(config.layout)) != Layout()}
    given |= {"engine": config.engine != "local", "node": config.node != 0, "nodes": config.nodes != 1}
    if config.shards is None and (name := next((name for name, is_given in given.items() if is_given), None)):
        raise DataError(f"{name}: of shards= only; shards={config.folder} output=<another folder> takes it")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from data_pipelines.cli import run_command

    def task(config: Any) -> int:
        _check_options(config)
        folder = Path(config.folder or config.output)
        if (folder / MANIFEST).exists() and not config.force:
            print(f"{folder}: already has {MANIFEST}; force=true indexes again")
            return 0
        about = {"source": config.name, "license": config.license, "split": config.split}
        if config.shards is None:
            manifest: Manifest | None = index_folder(folder, max_bad_share=config.max_bad_share, **about)
        else:
            manifest = _index_list(config, folder, about)
        if manifest is None:
            print(
                f"{folder}: node {config.node} of {config.nodes} is done; without node= and nodes=, the set is written"
            )
            return 0
        left_out = f", {sum(manifest.bad.values())} left out ({QUARANTINE})" if manifest.bad else ""
        counts = f"{manifest.samples} samples in {len(manifest.shards)} shards, {manifest.bytes} bytes"
        print(f"{folder}: {counts}{left_out}")
        return 0

    return run_command(task, "index", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
