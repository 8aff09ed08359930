"""What the model sees of a sample: its tokens, coloured by what is learned, and its pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.layout import ViewName
from vlm_train.contracts.streams import QFORMER
from vlm_train.data.images.plan import collect_pictures
from vlm_train.data.processor import Processor
from vlm_train.data.stream import ENDLESS
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.data.text.streams import IGNORE, Stream

PASSES = 3
"""Passes of training whose random views are shown."""

GREEN, DIM, BOLD, RESET = "\033[32m", "\033[2m", "\033[1m", "\033[0m"


def show_sample(processor: Processor, shards: ShardSet, options: Mapping[str, Any], *, seed: int, folder: Path) -> None:
    """Print the first sample of `shards` as tokens and save its views as `folder/show.png`; where training draws them
    at random, those of the first passes stand behind the one of evaluations.

    Args:
        options: those of rendering, see `vlm_train.data.text.render.RenderOptions`.
        seed: the run's.
    """
    sample, blobs = shards.load_sample(0)
    rendered = processor.render(sample, RenderOptions(**options))
    source = f", source {sample.source}" if sample.source else ""
    count = f"of {len(shards)} " if len(shards) < ENDLESS else ""
    print(f"sample {sample.key}, number 0 {count}in {shards.address}{source}")
    others = {} if processor.instruction is None else {QFORMER: processor.instruction.tokenizer}
    print(format_tokens(rendered, processor.tokenizer, sys.stdout.isatty(), others))
    if rendered.media and processor.images:
        random = any(plan.random for plan in processor.images.values())
        passes = [None, *((seed, epoch, 0) for epoch in range(PASSES if random else 0))]
        seen = [processor.make_views(blobs, shown=rendered.media, address=one) for one in passes]
        pictures = [picture for views in seen for picture in collect_pictures(views)]
        print(f"its views: {save_views(pictures, folder / 'show.png')}")
        if random:
            print(f"first as evaluations see it, then as training does in passes 0 to {PASSES - 1}")


def format_tokens(
    rendered: TokenizedSample, tokenizer: Any, color: bool, others: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """A sample's streams as text: learned tokens green (or between «»), media as `[image 0 x576]`, a line per group.

    A token counts as learned if some position of the stream has it as its target. `others`: the tokenizers of streams
    that have their own.
    """
    streams = rendered.streams.items()
    return "\n\n".join(_format_stream(name, stream, others.get(name, tokenizer), color) for name, stream in streams)


def _format_stream(name: str, stream: Stream, tokenizer: Any, color: bool) -> str:
    media = len({placed.slot.item for placed in stream.slots})
    lines = [f"stream {name}: {len(stream)} tokens, {stream.supervised} learned, {media} media"]
    learned = learned_tokens(stream)
    for group, start, end in _group_runs(stream):
        first, last = (",".join(map(str, stream.positions[:, t])) for t in (start, end - 1))
        part = "shared" if group == 0 else f"branch {group}" if group > 0 else "both directions"
        title = f"{part}: tokens {start}-{end - 1}, positions {first}-{last}"
        lines += ["", f"{BOLD}{title}{RESET}" if color else title]
        lines.append("".join(_decode_pieces(stream, learned, tokenizer, start, end, color)))
    return "\n".join(lines)


def learned_tokens(stream: Stream) -> NDArray[np.bool_]:
    """`[T]` True where the token at t is the target of the position before it (in its branch)."""
    learned = np.zeros(len(stream), bool)
    learned[1:] = (stream.labels[:-1] != IGNORE) & (stream.labels[:-1] == stream.ids[1:])
    return learned


def _group_runs(stream: Stream) -> Iterator[tuple[int, int, int]]:
    groups = stream.attention_group
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    for start, end in zip(edges, edges[1:], strict=False):
        yield int(groups[start]), start, end


def describe_view(view: ViewName) -> str:
    """A view in words: "whole", "row 1, column 2" or "frame 3"."""
    if view.kind == "tile":
        return f"row {view.row}, column {view.column}"
    return f"frame {view.number}" if view.kind == "frame" else view.kind


def _decode_pieces(
    stream: Stream, learned: NDArray[np.bool_], tokenizer: Any, start: int, end: int, color: bool
) -> Iterator[str]:
    """Decoded stretches of equal state between `start` and `end`, so that multi-token characters stay whole."""
    slots = {placed.start: placed for placed in stream.slots}
    position = start
    while position < end:
        if position in slots:
            slot = slots[position].slot
            size = f" x{slot.count}" if slot.count else ""  # without placeholders it stands before the next token
            view = "" if slot.view is None else f" {describe_view(slot.view)}"
            yield _paint_text(f"[image {slot.item}{view}{size}]", DIM, color)
            position += slot.count
            if slot.count:
                continue
        stop = position + 1
        while stop < end and stop not in slots and learned[stop] == learned[position]:
            stop += 1
        text = tokenizer.decode(stream.ids[position:stop].tolist(), skip_special_tokens=False)
        if learned[position]:
            yield _paint_text(text, GREEN, color) if color else f"«{text}»"
        else:
            yield text
        position = stop


def _paint_text(text: str, code: str, color: bool) -> str:
    return f"{code}{text}{RESET}" if color else text


def save_views(pictures: Sequence[NDArray[np.uint8]], path: str | Path) -> Path:
    """Save uint8 views `[3, H, W]` side by side, as near a square as they fit, as one PNG.

    Returns:
        The written path; its folder is created.
    """
    from PIL import Image

    if not len(pictures) or any(p.ndim != 3 or p.shape[0] != 3 or p.dtype != np.uint8 for p in pictures):
        found = ", ".join(f"{picture.dtype} {list(picture.shape)}" for picture in pictures)
        raise ValueError(f"save_views: expected uint8 [3, H, W] each, got {found or 'none'}")
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + picture.shape[1], left : left + picture.shape[2]] = picture.transpose(1, 2, 0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, format="PNG")
    return path
