"""A small set of captioned pictures, some samples of which a captioner cannot use."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.media import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards import ShardWriter
from tests.small_run import picture


def captioned(number: int, captions: int = 1, images: int = 1) -> tuple[Sample, list[bytes]]:
    """Sample `k<number>` whose captions are "a shape <number>", each one "x" longer than the one before."""
    blobs = [picture(number + i) for i in range(images)]
    show = Turn(role="user", parts=tuple(Media(item=i) for i in range(images)))
    answers = [Turn(role="assistant", parts=(Text(text=f"a shape {number}{'x' * n}"),)) for n in range(captions)]
    media = tuple(image_item(i, blob) for i, blob in enumerate(blobs))
    annotations = tuple(Annotation(turns=(show, answer)) for answer in answers)
    return Sample(key=f"k{number}", media=media, annotations=annotations, source="web"), blobs


def make_set(folder: Path, count: int = 7) -> Path:
    """Shards of 3; sample 2 has three captions, sample 4 two images."""
    with ShardWriter(folder, source="web", licence="CC0", samples_per_shard=3) as writer:
        for number in range(count):
            captions, images = (3 if number == 2 else 1), (2 if number == 4 else 1)
            writer.write(*captioned(number, captions, images))
    return folder
