"""Make a shard set of other programs' tars: `python -m data_pipelines.index folder=<folder>`, or, for many,
`python -m data_pipelines.index shards='<addresses>' output=<folder>`

Index and manifest are written beside the tars, which stay as they are: consecutive members `<key>.<name>` are a sample,
a picture or video with a `.txt` is a caption. The index says where every member of every sample lies, so that sample i
is one read away.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from data_pipelines.building.merge import QUARANTINE
from data_pipelines.errors import DataError
from data_pipelines.indexing.shard_lists import index_shards
from data_pipelines.media.limits import check_media
from data_pipelines.shards.index_file import INDEX, IndexBuilder
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import MANIFEST, FileInfo, Manifest
from data_pipelines.shards.members import scan_tar, to_sample
from data_pipelines.shards.stats import Stats, measure_lengths


def index_folder(folder: Path, *, source: str = "", license: str = "", split: str = "") -> Manifest:
    """Read every `*.tar` of `folder` once, check it, and write index and manifest beside them.

    Raises `DataError` naming the shard (and key) of the first truncated tar, refused or unusable member, interleaved
    sample or duplicate key.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: no *.tar files to index")
    builder, stats, shards = IndexBuilder(), Stats(), list[FileInfo]()
    for number, path in enumerate(paths):
        before = len(builder)
        for key, members in scan_tar(path):
            try:
                sample, blobs = to_sample(key, [(member.name, data) for member, data in members])
                for item, blob in zip(sample.media, blobs, strict=True):
                    check_media(item, blob)
                builder.add_sample(number, sample, [member for member, _ in members])
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
            stats.add_lengths(measure_lengths(sample, blobs))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        count = len(builder) - before
        shards.append(FileInfo(name=path.name, bytes=path.stat().st_size, sha256=digest, samples=count))
    manifest = Manifest(
        samples=len(builder),
        shards=tuple(shards),
        index=builder.write_file(folder / INDEX),
        source=source,
        license=license,
        split=split,
        command="index",
        stats=stats.to_json(),
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from data_pipelines.cli import run_command

    def task(config: Any) -> int:
        if (config.folder is None) == (config.shards is None):
            raise DataError("give folder=<a folder of tars> or shards=<addresses of tars>")
        folder = Path(config.folder or config.output or "")
        if config.shards is not None and config.output is None:
            raise DataError("shards: needs output=<folder>, which takes the indexes; the shards stay where they are")
        if (folder / MANIFEST).exists() and not config.force:
            print(f"{folder}: already has {MANIFEST}; force=true indexes again")
            return 0
        about = {"source": config.name, "license": config.license, "split": config.split}
        manifest = index_folder(folder, **about) if config.shards is None else _index_list(config, folder, about)
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
