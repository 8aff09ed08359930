"""A few samples, as a run would make them, for families, objectives and evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from data_pipelines.sources.tiny import Tiny
from vlm_train.contracts.batch import Batch
from vlm_train.data.collate import Example, collate_prompts, collate_rows
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions

COUNT = 4
REJECTED = Turn(role="assistant", parts=(Text(text="nothing"),))
"""The worse answer of every sample."""


def make_items(processor: Processor, *, rejected: bool = False, media: bool = True) -> list[Example]:
    """Made pictures with a question each, or questions alone."""
    items = []
    for sample, blobs in _read_samples(media):
        rendered = processor.render(sample, RenderOptions(annotations="first", rejected=rejected))
        items.append(Example(rendered, processor.make_views(blobs, shown=rendered.media), source=sample.source))
    return items


def make_batch(
    processor: Processor, items: Sequence[Example], streams: Sequence[str], columns: Sequence[str] = ()
) -> Batch:
    """One sample a row, with made numbers in `columns`; without items a row of padding."""
    rows = [[replace(item, columns=dict.fromkeys(columns, float(n)))] for n, item in enumerate(items)]
    return collate_rows(rows, processor.images, streams=streams, columns=columns)


def make_prompts(processor: Processor) -> Batch:
    """The questions of made pictures, for generation."""
    rendered = [
        (processor.render(sample, RenderOptions(annotations="first", generation=True)), processor.make_views(blobs))
        for sample, blobs in _read_samples(media=True)
    ]
    return collate_prompts(rendered, processor.images)


def write_samples(folder: Path, *, texts: bool = False) -> Path:
    """A shard set of the made pictures; with `texts` also of their questions alone."""
    with ShardWriter(folder, source=Tiny.name, license=Tiny.license) as writer:
        for record in Tiny(count=COUNT):
            assert isinstance(record, tuple)
            writer.write_sample(*record)
        for sample, blobs in _read_samples(media=False) if texts else ():
            writer.write_sample(replace(sample, key=f"text-{sample.key}"), blobs)
    return folder


def _read_samples(media: bool) -> list[tuple[Sample, list[bytes]]]:
    found = []
    for record in Tiny(count=COUNT):
        assert isinstance(record, tuple)
        sample, blobs = record
        annotation = replace(sample.annotations[0], rejected=REJECTED)
        if media:
            found.append((replace(sample, annotations=(annotation,)), blobs))
        else:
            turns = tuple(_drop_media(turn) for turn in annotation.turns)
            text = Annotation(turns=turns, rejected=REJECTED)
            found.append((replace(sample, annotations=(text,), media=()), []))
    return found


def _drop_media(turn: Turn) -> Turn:
    return replace(turn, parts=tuple(part for part in turn.parts if not isinstance(part, Media)))
