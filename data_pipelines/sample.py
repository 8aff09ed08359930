"""`Sample`: what one training example is, before any model, image size or tokenizer is chosen.

A sample holds media (images, videos) and one or more independent annotations about them. An annotation is an ordered
list of turns, a turn an ordered list of parts. Preference data adds a rejected last answer. Everything is a frozen,
slotted dataclass that converts to and from plain JSON; media bytes travel beside the JSON in the shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipelines.errors import BadSample

SCHEMA_VERSION = 1
Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "video"]
ROLES = ("system", "user", "assistant")
MEDIA_KINDS = ("image", "video")
MAX_WEIGHT = 1e6
"""Of a sample, an annotation, a turn or a stretch of text: larger ones overflow once they are multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Plain text. `weights` optionally weighs segments `(start, end, weight)` in characters (RLHF-V style)."""

    text: str
    weights: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """The place of media item number `item` of the sample inside a turn."""

    item: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A region of media item `item`: x1, y1, x2, y2 as fractions of width and height in [0, 1]."""

    item: int
    xyxy: tuple[float, float, float, float]


Part = Text | Media | Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one role says. Only assistant turns with `weight` > 0 are learned."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The turn's text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One conversation about the sample's media. `rejected` replaces the last turn in preference data."""

    turns: tuple[Turn, ...]
    rejected: Turn | None = None
    weight: float = 1.0

    @property
    def turns_until_answer(self) -> tuple[Turn, ...]:
        """The turns up to the last answer: nothing after it is learned."""
        answers = [number for number, turn in enumerate(self.turns, 1) if turn.role == "assistant"]
        return self.turns[: max(answers, default=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """One image or video: its member name in the shard and its size, known from the header.

    `width` and `height` are pixels; `frames` and `seconds` describe a video (1 and 0.0 for an image).
    """

    name: str
    width: int
    height: int
    kind: MediaKind = "image"
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training example. `key` is unique in its shard set; it knows no image size and no token."""

    key: str
    media: tuple[MediaItem, ...] = ()
    annotations: tuple[Annotation, ...]
    source: str = ""
    license: str = ""
    weight: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.annotations:
            raise BadSample(f"sample {self.key!r}: no annotations")
        for index, annotation in enumerate(self.annotations):
            turns = (*annotation.turns, annotation.rejected) if annotation.rejected else annotation.turns
            for turn in turns:
                problem = None
                if turn.role not in ROLES:
                    problem = f"role {turn.role!r}; allowed: {', '.join(ROLES)}"
                for part in turn.parts:
                    if not isinstance(part, Text) and not 0 <= part.item < len(self.media):
                        problem = f"names media item {part.item}, but the sample has {len(self.media)}"
                if problem:
                    raise BadSample(f"sample {self.key!r}, annotation {index}: {problem}")

    def to_json(self) -> dict[str, Any]:
        """The sample as plain JSON data; media bytes are stored beside it under each item's `name`.

        Raises `BadSample` for what JSON in UTF-8 cannot hold.
        """
        data = {
            "version": SCHEMA_VERSION,
            "source": self.source,
            "license": self.license,
            "weight": self.weight,
            "meta": dict(self.meta),
            "media": [
                {
                    "name": m.name,
                    "width": m.width,
                    "height": m.height,
                    "kind": m.kind,
                    "frames": m.frames,
                    "seconds": m.seconds,
                }
                for m in self.media
            ],
            "annotations": [
                {
                    "turns": [_turn_to_json(t) for t in a.turns],
                    "rejected": _turn_to_json(a.rejected) if a.rejected else None,
                    "weight": a.weight,
                }
                for a in self.annotations
            ],
        }
        try:
            check_json(data)
        except BadSample as error:
            raise BadSample(f"sample {self.key!r}: {error}") from error
        return data

    @classmethod
    def from_json(cls, key: str, data: Mapping[str, Any]) -> Sample:
        """Rebuild a sample. Raises `BadSample` if `data` is not of this schema."""
        if not isinstance(data, Mapping) or data.get("version") != SCHEMA_VERSION:
            version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise BadSample(f"sample {key!r}: schema version {version!r}, this program reads {SCHEMA_VERSION}")
        try:
            check_json(data, allow_nan=True)  # numbers are judged where they are read; what `meta` holds is not ours
            return cls(
                key=key,
                source=str(data["source"]),
                license=str(data["license"] if "license" in data else data["licence"]),  # as it was spelled before
                weight=_weight_from_json(data["weight"]),
                meta=dict(data["meta"]),
                media=tuple(_media_from_json(item) for item in data["media"]),
                annotations=tuple(
                    Annotation(
                        turns=tuple(_turn_from_json(t) for t in a["turns"]),
                        rejected=_turn_from_json(a["rejected"]) if a.get("rejected") else None,
                        weight=_weight_from_json(a["weight"]),
                    )
                    for a in data["annotations"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadSample(f"sample {key!r}: malformed: {type(error).__name__}: {error}") from error
        except BadSample as error:
            where = f"sample {key!r}"
            raise error if str(error).startswith(where) else BadSample(f"{where}: malformed: {error}") from error


def is_weight(value: float) -> bool:
    """Whether a loss may be multiplied by `value`: a number from 0 to `MAX_WEIGHT`."""
    return math.isfinite(value) and 0 <= value <= MAX_WEIGHT


def check_json(value: Any, *, allow_nan: bool = False) -> None:
    """Raise `BadSample` unless `value` can be written as JSON in UTF-8: no NaN, no bytes, and no lone surrogates, which
    raw JSON can spell."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample(f"not JSON in UTF-8: {error}") from error


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "weight": turn.weight, "parts": [_part_to_json(p) for p in turn.parts]}


def _part_to_json(part: Part) -> dict[str, Any]:
    match part:
        case Text():
            return {"text": part.text} | ({"weights": [list(w) for w in part.weights]} if part.weights else {})
        case Media():
            return {"media": part.item}
        case Box():
            return {"box": list(part.xyxy), "item": part.item}


def _weight_from_json(value: Any) -> float:
    weight = float(value)
    if not is_weight(weight):
        raise BadSample(f"weight {weight}; allowed: 0 to {MAX_WEIGHT:.0f}")
    return weight


def _media_from_json(data: Mapping[str, Any]) -> MediaItem:
    item = MediaItem(**data)
    if not isinstance(item.name, str) or item.kind not in MEDIA_KINDS:
        raise BadSample(f"media item {item.name!r} of kind {item.kind!r}; allowed: a name, {' or '.join(MEDIA_KINDS)}")
    if min(int(item.width), int(item.height), int(item.frames)) < 1 or not math.isfinite(item.seconds):
        size = f"{item.width} x {item.height} pixels, {item.frames} frames, {item.seconds} seconds"
        raise BadSample(f"media item {item.name!r} of {size}; allowed: 1 or more, and a time")
    return item


def _turn_from_json(data: Mapping[str, Any]) -> Turn:
    parts: list[Part] = []
    for part in data["parts"]:
        if "text" in part:
            weights = tuple((int(a), int(b), _weight_from_json(w)) for a, b, w in part.get("weights") or ())
            if not isinstance(part["text"], str):
                raise BadSample(f"a text part holds {part['text']!r:.80}")
            parts.append(Text(text=part["text"], weights=weights))
        elif "media" in part:
            parts.append(Media(item=int(part["media"])))
        else:
            x1, y1, x2, y2 = (float(v) for v in part["box"])
            parts.append(Box(item=int(part["item"]), xyxy=(x1, y1, x2, y2)))
    return Turn(role=data["role"], weight=_weight_from_json(data["weight"]), parts=tuple(parts))
