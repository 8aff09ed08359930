"""Check a shard set: `python -m data_pipelines.lint folder=<folder>`. Exit code 1 if anything is wrong with it.

Reports, with shard and key: damaged or missing files, truncated tars, duplicate keys, placeholders that do not fit the
media, empty answers, images and videos that do not decode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from data_pipelines.cli import run
from data_pipelines.errors import BadSample, DataError
from data_pipelines.media import check_media, check_pixels
from data_pipelines.members import scan
from data_pipelines.sample import Box, Media, Sample, Text
from data_pipelines.stream import ShardSet

TAG = "<image>"


def problems(folder: Path) -> Iterator[str]:
    """Everything wrong with the shard set in `folder`, one line each."""
    try:
        shards = ShardSet(folder)
    except DataError as error:
        yield str(error)
        yield from _scan_problems(sorted(folder.glob("*.tar")))
        return
    try:
        shards.verify()
    except DataError as error:
        yield str(error)
    yield from _scan_problems([folder / info.name for info in shards.manifest.shards])
    for i in range(len(shards)):
        where = f"{folder / shards.shard(i)}, key {shards.key(i)!r}"
        try:
            sample, blobs = shards.load(i)
        except BadSample as error:
            yield str(error)
            continue
        yield from (f"{where}: {problem}" for problem in sample_problems(sample, blobs))


def sample_problems(sample: Sample, blobs: list[bytes]) -> Iterator[str]:
    """What is wrong inside one readable sample."""
    for item, blob in zip(sample.media, blobs, strict=True):
        try:
            check_media(item, blob)
            check_pixels(blob)
        except BadSample as error:
            yield f"{item.name}: {error}"
    used: set[int] = set()
    for number, annotation in enumerate(sample.annotations):
        items = [part.item for turn in annotation.turns for part in turn.parts if isinstance(part, Media)]
        used.update(items)
        if len(set(items)) < len(items):
            yield f"annotation {number}: places a media item more than once: {items}"
        for turn in annotation.turns:
            boxes = any(isinstance(part, Box) for part in turn.parts)
            if turn.role == "assistant" and not boxes and not turn.text.strip():
                yield f"annotation {number}: empty answer"
            if turn.role == "user" and any(TAG in part.text for part in turn.parts if isinstance(part, Text)):
                yield f"annotation {number}: {TAG} left in the text of a user turn"
        if not any(turn.role == "assistant" for turn in annotation.turns):
            yield f"annotation {number}: no answer"
    if used and len(used) < len(sample.media):
        yield f"{len(sample.media)} media items, but only {sorted(used)} are placed in its turns"


def _scan_problems(paths: list[Path]) -> Iterator[str]:
    seen: dict[str, Path] = {}
    for path in paths:
        try:
            for key, _ in scan(path):
                if key in seen:
                    yield f"{path}, key {key!r}: duplicate, also in {seen[key]}"
                seen[key] = path
        except (DataError, OSError) as error:
            yield str(error)


def lint(config: DictConfig) -> int:
    """Print the problems; returns the exit code."""
    count = 0
    for problem in problems(Path(config.folder)):
        count += 1
        if count <= config.max_problems:
            print(problem)
    print(f"{config.folder}: {count} problems" if count else f"{config.folder}: no problems")
    return 1 if count else 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run(lint, "lint", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
