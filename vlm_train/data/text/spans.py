"""Segments: what a template hands to the renderer, and how the parts of a turn become segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from data_pipelines.sample import Box, Media, Text, Turn
from vlm_train.errors import ConfigError

MediaPlace = Literal["first", "inline", "drop"]


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of text. `weight` > 0 is learned; in `content` (from the sample) special tokens are plain text."""

    text: str
    weight: float = 0.0
    content: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """The place of media item `item`."""

    item: int


Segment = Run | Place


@dataclass(frozen=True, kw_only=True)
class ContentStyle:
    """How the parts of a turn become segments: shared by all templates.

    Attributes:
        media: first (to the front of their turn, the text stripped, as LLaVA does) | inline | drop.
        media_prefix, media_suffix: text around every media item.
        strip: strip white space around every turn.
        box, box_scale: `str.format` pattern of a box and the factor on its fractions.
    """

    media: MediaPlace = "first"
    media_prefix: str = ""
    media_suffix: str = "\n"
    strip: bool = False
    box: str = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]"
    box_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.media not in get_args(MediaPlace):
            raise ConfigError(f"template.media: {self.media!r}; allowed: {', '.join(get_args(MediaPlace))}")

    def make_spans(self, turn: Turn, weight: float = 0.0, *, text: bool = True) -> list[Segment]:
        """Segments of one turn's parts; `weight` is the loss weight of its text; `text=False` keeps only media."""
        parts: list[Segment] = []
        has_media = any(isinstance(part, Media) for part in turn.parts) and self.media != "drop"
        for part in turn.parts:
            if isinstance(part, Media):
                parts += [Place(part.item)] if self.media != "drop" else []
            elif text:
                parts += self._make_text_spans(part, weight)
        if self.media == "first" and has_media:
            places = [part for part in parts if isinstance(part, Place)]
            parts = [*places, *strip_spans([part for part in parts if isinstance(part, Run)])]
        elif self.strip:
            parts = strip_spans(parts)
        return [segment for part in parts for segment in self._wrap_media(part)]

    def _wrap_media(self, part: Segment) -> list[Segment]:
        if isinstance(part, Run):
            return [part]
        return [Run(self.media_prefix), part, Run(self.media_suffix)]

    def _make_text_spans(self, part: Text | Box, weight: float) -> list[Run]:
        if isinstance(part, Box):
            return [Run(self.box.format(*(self.box_scale * value for value in part.xyxy)), weight, content=True)]
        cuts = sorted({0, len(part.text), *(c for start, end, _ in part.weights for c in (start, end))})
        runs = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            factor = next((w for a, b, w in part.weights if a <= start < b), 1.0)
            runs.append(Run(part.text[start:end], weight * factor, content=True))
        return runs


def strip_spans(parts: Sequence[Segment]) -> list[Any]:
    """`parts` without white space at both ends (media stop the stripping)."""
    kept = list(parts)
    for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while kept and isinstance(run := kept[index], Run):
            text = strip(run.text)
            if text:
                kept[index] = Run(text, run.weight, run.content)
                break
            kept.pop(index)
    return kept


def stripped_turn(turn: Turn) -> Turn:
    """`turn` without white space at both ends of its text."""
    parts = list(turn.parts)
    for index, left in ((0, True), (-1, False)):
        if parts and isinstance(text := parts[index], Text):
            parts[index] = _stripped_text(text, left)
    return replace(turn, parts=tuple(parts))


def _stripped_text(part: Text, left: bool) -> Text:
    text = part.text.lstrip() if left else part.text.rstrip()
    moved = len(part.text) - len(text) if left else 0
    return Text(text=text, weights=tuple((max(a - moved, 0), max(b - moved, 0), w) for a, b, w in part.weights))
