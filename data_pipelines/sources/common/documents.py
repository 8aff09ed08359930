"""What sources of interleaved documents share: texts and images in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from data_pipelines.errors import BadSample
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Part, Text, Turn


def make_document(pieces: Iterable[str | bytes], joint: str) -> tuple[Annotation, list[bytes]]:
    """An interleaved document as one learned turn: texts, and images as bytes, in their order.

    `joint` stands between texts that follow each other; white space beside an image belongs to templates.
    """
    parts: list[Part] = []
    blobs: list[bytes] = []
    for shown, run in groupby(pieces, key=lambda piece: isinstance(piece, bytes)):
        if shown:
            for blob in run:
                parts.append(Media(item=len(blobs)))
                blobs.append(blob)  # type: ignore[arg-type]
        elif text := joint.join(piece.strip() for piece in run if isinstance(piece, str)).strip():
            parts.append(Text(text=text))
    return Annotation(turns=(Turn(role="assistant", parts=tuple(parts)),)), blobs


def read_image(read: Callable[[], bytes], min_bytes: int = 0) -> bytes | None:
    """The image that `read` gives; None for one that is not there, is smaller, or is no image (a dead link's page)."""
    try:
        data = read()
        image_item(0, data)
    except BadSample:
        return None
    return data if len(data) >= min_bytes else None
