"""Show samples of a shard set: `python -m data_pipelines.inspect folder=<folder> [n=5] [start=0] [html=<file>]`"""

from __future__ import annotations

import base64
import sys
from html import escape
from io import BytesIO
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image

from data_pipelines.cli import run
from data_pipelines.errors import BadSample
from data_pipelines.members import extension
from data_pipelines.sample import Annotation, Box, Media, MediaItem, Part, Sample, Text
from data_pipelines.stream import ShardSet
from data_pipelines.video import read_frames, spread

STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}img{max-height:20em;min-height:8em;margin:.3em}"
FRAMES = 4  # of a video in the page


def as_text(sample: Sample, blobs: list[bytes], where: str) -> str:
    """One sample for the terminal."""
    lines = [f"{sample.key}  ({where}; {sample.source}, {sample.licence or 'licence unknown'})"]
    for number, (item, blob) in enumerate(zip(sample.media, blobs, strict=True)):
        lines.append(f"  media {number}: {item.name}, {item.width} x {item.height}{_length(item)}, {len(blob)} bytes")
    for number, annotation in enumerate(sample.annotations):
        lines.append(f"  annotation {number}")
        lines += [f"    {role:<10}{text}" for role, text in _turns(annotation)]
    return "\n".join(lines)


def as_html(sample: Sample, blobs: list[bytes], where: str) -> str:
    """One sample as a section of a page, pictures included."""
    pictures = [_show(item, blob) for item, blob in zip(sample.media, blobs, strict=True)]
    rows = [
        f"<tr><td>{number}</td><td>{escape(role)}</td><td>{escape(text)}</td></tr>"
        for number, annotation in enumerate(sample.annotations)
        for role, text in _turns(annotation)
    ]
    title = f"<h2>{escape(sample.key)}</h2><p>{escape(where)}; {escape(sample.source)}, {escape(sample.licence)}</p>"
    return f"<section>{title}{''.join(pictures)}<table>{''.join(rows)}</table></section>"


def _turns(annotation: Annotation) -> list[tuple[str, str]]:
    turns = [(turn.role, "".join(map(_part, turn.parts))) for turn in annotation.turns]
    rejected = annotation.rejected
    return turns + ([("rejected", "".join(map(_part, rejected.parts)))] if rejected else [])


def _part(part: Part) -> str:
    match part:
        case Text():
            return part.text
        case Media():
            return f"[media {part.item}] "
        case Box():
            return f"[box {part.xyxy} of media {part.item}] "


def _length(item: MediaItem) -> str:
    return f", {item.frames} frames in {item.seconds} s" if item.kind == "video" else ""


def _show(item: MediaItem, blob: bytes) -> str:
    """An image, or some frames of a video."""
    if item.kind == "image":
        return _picture(item.name, blob)
    pictures = []
    try:
        for pixels in read_frames(blob, spread(item.frames, FRAMES)):
            Image.fromarray(pixels).save(file := BytesIO(), "JPEG")
            pictures.append(_picture(f"{item.name}.jpg", file.getvalue()))
    except BadSample as error:
        pictures.append(f"<p>{escape(f'{item.name}: {error}')}</p>")
    return "".join(pictures)


def _picture(name: str, blob: bytes) -> str:
    kind = extension(name).replace("jpg", "jpeg")
    return f'<img alt="{escape(name)}" src="data:image/{escape(kind)};base64,{base64.b64encode(blob).decode()}">'


def inspect(config: DictConfig) -> int:
    """Print samples, and write the page if asked for; returns the exit code."""
    shards = ShardSet(config.folder)
    sections = []
    print(f"{config.folder}: {len(shards)} samples in {len(shards.manifest.shards)} shards")
    for i in range(config.start, min(config.start + config.n, len(shards))):
        try:
            sample, blobs = shards.load(i)
        except BadSample as error:
            print(f"\nunusable: {error}")
            continue
        print("\n" + as_text(sample, blobs, shards.shard(i)))
        sections.append(as_html(sample, blobs, shards.shard(i)))
    if config.html:
        title = escape(str(config.folder))
        page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        Path(config.html).write_text(page + "".join(sections), encoding="utf-8")
        print(f"\nwrote {config.html}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run(inspect, "inspect", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
