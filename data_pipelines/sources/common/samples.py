"""Raw data -> samples, and what stands for a raw record that cannot be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Box, Media, Part, Sample, Text, Turn
from data_pipelines.shards.members import safe_key

Record = tuple[Sample, list[bytes]] | BadSample
"""A sample with the encoded bytes of its media, or the error that stands for an unusable record."""

Made = TypeVar("Made")

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What code that reads raw data without checking every field raises where it is not laid out as published."""


class Origin(Protocol):
    """What a sample says of where it comes from: a source, mostly."""

    name: str
    license: str


def make_sample(
    origin: Origin,
    key: str,
    blobs: Sequence[bytes],
    annotations: Sequence[Annotation],
    meta: Mapping[str, Any] | None = None,
) -> tuple[Sample, list[bytes]]:
    """A sample whose media are the images and videos `blobs`, in order. `key` is made safe. Raises `BadSample`."""
    sample = Sample(
        key=safe_key(key),
        media=tuple(media_item(number, blob) for number, blob in enumerate(blobs)),
        annotations=tuple(annotations),
        source=origin.name,
        license=origin.license,
        meta=dict(meta or {}),
    )
    return sample, list(blobs)


def make_exchange(
    ask: str | Sequence[Part],
    answer: str | Box,
    *,
    items: Sequence[int] = (0,),
    rejected: str | None = None,
    weight: float = 1.0,
) -> Annotation:
    """A user turn, media before the question, and its answer; `rejected` is a worse answer."""
    asked = (Text(text=ask),) if isinstance(ask, str) else tuple(ask)
    turns = (Turn(role="user", parts=(*(Media(item=item) for item in items), *asked)), _answer_turn(answer))
    return Annotation(turns=turns, rejected=None if rejected is None else _answer_turn(rejected), weight=weight)


def _answer_turn(answer: str | Box) -> Turn:
    return Turn(role="assistant", parts=(answer if isinstance(answer, Box) else Text(text=answer),))


def try_record(make: Callable[[], Made], label: Callable[[], str]) -> Made | BadSample:
    """What `make` gives, or the `BadSample` that stands for it, with the name that `label` gives the raw record."""
    try:
        return make()
    except BadSample as error:
        return BadSample(f"{label()}: {error}", kind=error.kind)
    except MALFORMED as error:
        return BadSample(f"{label()}: malformed: {type(error).__name__}: {error}")


def check_choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value`. Raises `DataError` unless it is allowed."""
    if value not in allowed:
        raise DataError(f"{option}: got {value!r}; allowed: {', '.join(allowed)}")
    return value
