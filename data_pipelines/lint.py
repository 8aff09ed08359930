"""Check a shard set: `python -m data_pipelines.lint folder=<folder>`. Exit code 1 if anything is wrong with it.

Reports, with shard and key: damaged, truncated or missing files, duplicate keys, samples that cannot be read, images or
videos that do not decode, placeholders that do not fit the media, empty questions and answers, boxes outside their
picture, negative weights; as a warning, samples of unknown source or license, and pictures of 16 bits, with
transparency or with an Exif orientation. Ends with the counts by kind.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from data_pipelines.building import engines
from data_pipelines.building.progress import Progress
from data_pipelines.cli import run_command
from data_pipelines.errors import BadSample, DataError
from data_pipelines.indexing.tar_samples import scan_samples
from data_pipelines.media.limits import check_media, check_pixels, is_stored_size
from data_pipelines.media.pictures import list_traits
from data_pipelines.sample import Annotation, Box, Media, Sample, Text, Turn, is_weight
from data_pipelines.shards.layout import OwnLayout
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_set import ShardSet

TAG = "<image>"
CHUNK = 64  # samples that a process checks before it answers
UNKNOWN = ("unknown source", "unknown license")
TRAITS = {
    "16-bit picture": "its 16 bits are scaled to 8",
    "transparent picture": "image.background is what stands behind it",
    "turned picture": "its Exif orientation turns it; boxes are of the upright picture",
}
STORED = "size of a turned picture"
WARNINGS = (*UNKNOWN, *TRAITS, STORED)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: what kind it is, and where and what exactly."""

    kind: str
    text: str


def find_problems(folder: Path, *, workers: int | None = 1) -> Iterator[Problem]:
    """Everything wrong with the shard set in `folder`."""
    try:
        shards = ShardSet(folder)
    except DataError as error:
        yield Problem("files", str(error))
        yield from _check_shards(
            folder, [FileInfo(name=p.name, bytes=0, sha256="") for p in _list_tars(folder)], workers
        )
        return
    yield from _check_shards(folder, shards.manifest.shards, workers)
    chunks = range(-(-len(shards) // CHUNK))
    results = engines.run_jobs(_check_samples, shards, chunks, workers=workers)
    with closing(results), Progress(f"{folder}: samples", len(chunks), "chunks") as progress:
        for found in engines.in_order(results):
            progress.add_records(CHUNK)
            yield from found


def sample_problems(sample: Sample, blobs: Sequence[bytes]) -> Iterator[Problem]:
    """What is wrong inside one readable sample."""
    for item, blob in zip(sample.media, blobs, strict=True):
        try:
            check_media(item, blob)
            check_pixels(blob)
            if item.kind == "image":
                for trait in list_traits(blob):
                    yield Problem(trait, f"{item.name}: {trait}: {TRAITS[trait]}")
                if is_stored_size(item, blob):
                    text = f"{item.width} x {item.height} pixels are its size as stored; build or index the set again"
                    yield Problem(STORED, f"{item.name}: {text}")
        except BadSample as error:
            yield Problem(f"damaged {item.kind}", f"{item.name}: {error}")
    if not is_weight(sample.weight):
        yield Problem("weight", f"sample weight {sample.weight}")
    used: set[int] = set()
    for number, annotation in enumerate(sample.annotations):
        items = [part.item for turn in annotation.turns for part in turn.parts if isinstance(part, Media)]
        used.update(items)
        if len(set(items)) < len(items):
            yield Problem("placeholder", f"annotation {number}: places a media item more than once: {items}")
        for problem in _annotation_problems(annotation):
            yield Problem(problem.kind, f"annotation {number}: {problem.text}")
    if used and len(used) < len(sample.media):
        text = f"{len(sample.media)} media items, but only {sorted(used)} are placed in its turns"
        yield Problem("placeholder", text)


def _annotation_problems(annotation: Annotation) -> Iterator[Problem]:
    if not is_weight(annotation.weight):
        yield Problem("weight", f"weight {annotation.weight}")
    if not any(turn.role == "assistant" for turn in annotation.turns):
        yield Problem("no answer", "no answer")
    for number, turn in enumerate((*annotation.turns, *([annotation.rejected] if annotation.rejected else []))):
        for problem in _turn_problems(turn):
            yield Problem(problem.kind, f"turn {number}: {problem.text}")


def _turn_problems(turn: Turn) -> Iterator[Problem]:
    if turn.role == "assistant" and not turn.text.strip() and not any(isinstance(part, Box) for part in turn.parts):
        yield Problem("empty answer", "empty answer")
    if turn.role == "user":
        if not turn.text.strip() and all(isinstance(part, Text) for part in turn.parts):
            yield Problem("empty question", "neither text nor media")
        if any(TAG in part.text for part in turn.parts if isinstance(part, Text)):
            yield Problem("placeholder", f"{TAG} left in the text of a user turn")
    if not is_weight(turn.weight):
        yield Problem("weight", f"weight {turn.weight}")
    for part in turn.parts:
        if isinstance(part, Box) and not _is_box(part.xyxy):
            yield Problem("box", f"box {part.xyxy}; expected 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
        if isinstance(part, Text):
            for start, stop, weight in part.weights:
                if not (is_weight(weight) and 0 <= start < stop <= len(part.text)):
                    yield Problem("weight", f"segment {(start, stop, weight)} of a text of {len(part.text)} characters")


def _is_box(xyxy: tuple[float, float, float, float]) -> bool:
    x1, y1, x2, y2 = xyxy
    return 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def _check_samples(shards: ShardSet, chunk: int) -> list[Problem]:
    found = []
    about = shards.manifest
    for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(shards))):
        where = f"{shards.folder / shards.shard_name(i)}, key {shards.key(i)!r}"
        try:
            sample, blobs = shards.load_sample(i)
        except BadSample as error:
            found.append(Problem("unreadable sample", str(error)))
            continue
        found += [Problem(problem.kind, f"{where}: {problem.text}") for problem in sample_problems(sample, blobs)]
        for warning, known in zip(UNKNOWN, (sample.source or about.source, sample.license or about.license)):
            if not known:
                found.append(Problem(warning, f"{where}: {warning}"))
    return found


def _list_tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def _check_shards(folder: Path, infos: Sequence[FileInfo], workers: int | None) -> Iterator[Problem]:
    """What is wrong with the tars as such; `sha256` is "" where it is not known."""
    seen: dict[str, Path] = {}
    results = engines.run_jobs(_check_shard, (folder, infos), range(len(infos)), workers=workers)
    with closing(results), Progress(f"{folder}: shards", len(infos), "shards") as progress:
        for info, (keys, as_indexed, found) in zip(infos, engines.in_order(results), strict=True):
            path = folder / info.name
            for key in keys:
                if key in seen and not as_indexed:
                    yield Problem("duplicate key", f"{path}, key {key!r}: duplicate, also in {seen[key]}")
                seen[key] = path
            yield from found
            progress.add_records(len(keys))


def _check_shard(shared: tuple[Path, Sequence[FileInfo]], number: int) -> tuple[list[str], bool, list[Problem]]:
    """The keys of a shard, whether it is as it was indexed, and what is wrong with it. A sample that is unusable there,
    or a duplicate, is not in the set."""
    folder, info = shared[0], shared[1][number]
    path, keys, found, as_indexed = folder / info.name, list[str](), list[Problem](), False
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            as_indexed = digest == info.sha256
            if info.sha256 and not as_indexed:
                text = f"{path}: sha256 {digest[:12]}, manifest says {info.sha256[:12]}"
                found.append(Problem("damaged shard", text))
            file.seek(0)
            for key, members in scan_samples(file, OwnLayout()):
                if not isinstance(members, BadSample):
                    keys.append(key)
                elif not as_indexed:
                    found.append(Problem("damaged shard", f"{path}: {members}"))
    except (DataError, OSError) as error:
        found.append(Problem("damaged shard", str(error)))
    return keys, as_indexed, found


def lint_set(config: DictConfig) -> int:
    """Print the problems and their counts; returns the exit code."""
    if is_remote(str(config.folder)):
        raise DataError(f"folder: {config.folder} is remote; lint reads every byte, so check a set before its upload")
    counts: Counter[str] = Counter()
    for problem in find_problems(Path(config.folder), workers=config.workers):
        counts[problem.kind] += 1
        most = min(config.max_problems, 1) if problem.kind in WARNINGS else config.max_problems
        if counts[problem.kind] <= most:
            print(f"{'warning: ' if problem.kind in WARNINGS else ''}{problem.text}")
        elif counts[problem.kind] == most + 1:
            print(f"... and more of this kind: {problem.kind}")
    for name, count in sorted(counts.items(), key=lambda item: (item[0] in WARNINGS, -item[1], item[0])):
        print(f"  {count:>8}  {name}{' (warning)' if name in WARNINGS else ''}")
    wrong = sum(count for name, count in counts.items() if name not in WARNINGS)
    print(f"{config.folder}: {wrong or 'no'} problem{'s' * (wrong != 1)}")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lint_set, "lint", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
