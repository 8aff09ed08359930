"""Show samples of a shard set: `python -m data_pipelines.inspect folder=<folder> [n=5] [start=0] [html=<file>]`

`key=<key>` shows that sample, `random=<n>` some drawn by `seed`. The page shows pictures with the boxes drawn, and the
statistics of the set.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from data_pipelines.cli import run_command
from data_pipelines.errors import BadSample, DataError
from data_pipelines.inspection.html import render_page, sample_fields, unusable_fields
from data_pipelines.sample import Annotation, Box, Media, MediaItem, Part, Sample, Text
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.shard_set import ShardSet


def format_statistics(manifest: Manifest) -> str:
    """The set's statistics for the terminal."""
    lines = [f"{manifest.source or 'source unknown'}, {manifest.license or 'license unknown'}, {manifest.bytes} bytes"]
    for name, stat in manifest.stats.items():
        rest = " ".join(f"{key}={stat[key]}" for key in ("min", "p5", "p50", "p95", "max") if key in stat)
        lines.append(f"  {name:<12}{stat['count']:>10}  {rest}")
    for what, counts in (("bad", manifest.bad), ("skipped", manifest.skipped), ("dropped", manifest.dropped)):
        lines += [f"  {what:<12}{count:>10}  {reason}" for reason, count in counts.items()]
    return "\n".join(lines)


def as_text(sample: Sample, blobs: list[bytes], where: str) -> str:
    """One sample for the terminal."""
    lines = [f"{sample.key}  ({where}; {sample.source}, {sample.license or 'license unknown'})"]
    for number, (item, blob) in enumerate(zip(sample.media, blobs, strict=True)):
        lines.append(
            f"  media {number}: {item.name}, {item.width} x {item.height}{_format_length(item)}, {len(blob)} bytes"
        )
    for number, annotation in enumerate(sample.annotations):
        lines.append(f"  annotation {number}")
        lines += [f"    {role:<10}{text}" for role, text in _format_turns(annotation)]
    return "\n".join(lines)


def _format_length(item: MediaItem) -> str:
    return f", {item.frames} frames in {item.seconds} s" if item.kind == "video" else ""


def _format_turns(annotation: Annotation) -> list[tuple[str, str]]:
    turns = [(turn.role, "".join(map(_format_part, turn.parts))) for turn in annotation.turns]
    rejected = annotation.rejected
    return turns + ([("rejected", "".join(map(_format_part, rejected.parts)))] if rejected else [])


def _format_part(part: Part) -> str:
    match part:
        case Text():
            return part.text
        case Media():
            return f"[media {part.item}] "
        case Box():
            return f"[box {' '.join(f'{value:.3f}' for value in part.xyxy)} of media {part.item}] "


def _choose_samples(shards: ShardSet, config: DictConfig) -> list[int]:
    """The numbers of the samples to show."""
    if config.key is not None:
        key = str(config.key)
        keys = shards.keys()
        if key not in keys:
            raise DataError(f"{config.folder}: no sample {key!r}; the first keys: {', '.join(keys[:3])}")
        return [keys.index(key)]
    if config.random is not None:
        if not isinstance(config.random, int):
            raise DataError(f"random: got {config.random!r}; expected a number of samples")
        return sorted(random.Random(config.seed).sample(range(len(shards)), min(config.random, len(shards))))
    return list(range(config.start, min(config.start + config.n, len(shards))))


def inspect_set(config: DictConfig) -> int:
    """Print samples, and write the page if asked for; returns the exit code."""
    shards = ShardSet(config.folder)
    sections = []
    print(f"{config.folder}: {len(shards)} samples in {len(shards.manifest.shards)} shards")
    print(format_statistics(shards.manifest))
    for i in _choose_samples(shards, config):
        try:
            sample, blobs = shards.load_sample(i)
        except BadSample as error:
            print(f"\nunusable: {error}")
            sections.append(unusable_fields(shards.key(i), shards.shard_name(i), error))
            continue
        sample = replace(
            sample,
            source=sample.source or shards.manifest.source,
            license=sample.license or shards.manifest.license,
        )
        print("\n" + as_text(sample, blobs, shards.shard_name(i)))
        if config.html:
            sections.append(sample_fields(sample, blobs, shards.shard_name(i)))
    if config.html:
        Path(config.html).write_text(render_page(str(config.folder), shards.manifest, sections), encoding="utf-8")
        print(f"\nwrote {config.html}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(inspect_set, "inspect", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
