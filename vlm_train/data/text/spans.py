"""Spans: what a template hands to the tokenizer, how the parts of a turn become spans, and what text must not spell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

from data_pipelines.sample import Box, Media, Turn
from vlm_train.contracts.layout import Piece, Slot
from vlm_train.errors import ConfigError

MediaPlace = Literal["first", "inline", "drop", "front"]
VIEWS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "tile": ("row", "column"),
    "frame": ("number",),
    "frame_end": ("number",),
}
"""Texts beside views -> what `{...}` in them may say."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A stretch of text. `weight` > 0 is learned; in `content` (from the sample) special tokens are plain text; `apart`
    begins a text that is tokenized by itself."""

    text: str
    weight: float = 0.0
    content: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where media item `item` stands, between the texts `before` and `after`."""

    item: int
    before: str = ""
    after: str = ""


Span = TextSpan | MediaSpan


@dataclass(frozen=True, slots=True)
class MediaRun:
    """What a layout lays for media item `item`, or for one view of it, whose features begin at `offset`."""

    item: int
    pieces: tuple[Piece, ...]
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class ContentStyle:
    """How the parts of a turn become spans: shared by all templates.

    Attributes:
        media: first (to the front of their turn, the text stripped, as LLaVA does) | inline | drop | front (as first,
            before their turn and its prefix).
        media_prefix, media_suffix: text around every media item.
        media_suffix_alone: text behind the last media item of a turn that has no text, with `first`; None:
            `media_suffix`.
        several_prefix: text before `media_prefix` where a conversation shows several media items; `{number}` counts
            them from 1, `{index}` from 0.
        views: text before the view of all of an image (`whole`) and before every tile of it (`tile`, whose `{row}` and
            `{column}` count from 1); text around every frame of a video (`frame`, `frame_end`, `{number}` counts from
            1), in place of `media_prefix` and `media_suffix` around all of it.
        strip: strip white space around every turn.
        box, box_scale: `str.format` pattern of a box and the factor on its fractions.
        caption_words: clean the answers as BLIP cleans captions, and keep at most so many words of each, see
            `vlm_train.data.text.captions`; None: as they are.
        keep_end: an answer that is cut keeps its last token, the end of the text, as tokenizers of BERT and T5 cut.
    """

    media: MediaPlace = "first"
    media_prefix: str = ""
    media_suffix: str = "\n"
    media_suffix_alone: str | None = None
    several_prefix: str = ""
    views: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False
    box: str = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]"
    box_scale: float = 1.0
    caption_words: int | None = None
    keep_end: bool = False

    def __post_init__(self) -> None:
        if self.media not in get_args(MediaPlace):
            raise ConfigError(f"template.media: {self.media!r}; allowed: {', '.join(get_args(MediaPlace))}")
        if self.caption_words is not None and self.caption_words < 1:
            raise ConfigError(f"template.caption_words: {self.caption_words}; allowed: 1 or more, or null")
        if unknown := self.views.keys() - VIEWS.keys():
            raise ConfigError(f"template.views: {', '.join(sorted(unknown))}; allowed: {', '.join(VIEWS)}")
        if ("frame" in self.views) != ("frame_end" in self.views):
            raise ConfigError("template.views: frame and frame_end go together; set both, or neither")
        known = {f"views.{name}": (text, VIEWS[name]) for name, text in self.views.items()}
        for name, (text, counts) in {"several_prefix": (self.several_prefix, ("number", "index")), **known}.items():
            try:
                text.format(**dict.fromkeys(counts, 1))
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                allowed = " and ".join(f"{{{one}}}" for one in counts) or "no counts"
                raise ConfigError(f"template.{name}: {text!r}; allowed in it: {allowed}") from error

    def write_media(
        self, span: MediaSpan, pieces: Sequence[Piece], place: int | None = None
    ) -> list[TextSpan | MediaRun]:
        """The text around and between what a layout lays for an item.

        `place`: which one it is of the several items that the conversation shows, from 0; None: the only one.
        """
        count = "" if place is None else self.several_prefix.format(number=place + 1, index=place)
        views = [piece.view for piece in pieces if isinstance(piece, Slot) and piece.view is not None]
        framed = "frame" in self.views and any(view.kind == "frame" for view in views)
        before, after = ("", "") if framed else (span.before, span.after)
        if not views:
            return [TextSpan(count + before), MediaRun(span.item, tuple(pieces)), TextSpan(after)]
        written, offset = list[TextSpan | MediaRun]([TextSpan(count + before)]), 0
        for piece in pieces:
            view = piece.view if isinstance(piece, Slot) else None
            text, end = ("", "") if view is None else (self.views.get(view.kind, ""), self.views.get("frame_end", ""))
            counts = {} if view is None else view._asdict()
            written += [TextSpan(text.format(**counts)), MediaRun(span.item, (piece,), offset)]
            written.append(TextSpan(end.format(**counts) if framed else ""))
            offset += piece.count if isinstance(piece, Slot) else 0
        return [*written, TextSpan(after)]

    def make_spans(self, turn: Turn, weight: float = 0.0, *, text: bool = True) -> list[Span]:
        """The spans of one turn's parts; `weight` is the loss weight of its text; `text=False` keeps only media."""
        spans: list[Span] = []
        for part in turn.parts:
            if isinstance(part, Media):
                spans += [] if self.media == "drop" else [MediaSpan(part.item, self.media_prefix, self.media_suffix)]
            elif not text:
                continue
            elif isinstance(part, Box):
                written = self.box.format(*(self.box_scale * value for value in part.xyxy))
                spans.append(TextSpan(written, weight, content=True))
            else:
                for start, end in pairwise(
                    sorted({0, len(part.text), *(cut for a, b, _ in part.weights for cut in (a, b))})
                ):
                    factor = next((w for a, b, w in part.weights if a <= start < b), 1.0)
                    spans.append(TextSpan(part.text[start:end], weight * factor, content=True))
        front = [span for span in spans if isinstance(span, MediaSpan)] if self.media in ("first", "front") else []
        rest = [span for span in spans if isinstance(span, TextSpan)] if front else spans
        for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
            while (front or self.strip) and rest and isinstance(span := rest[index], TextSpan):  # up to a media item
                if stripped := strip(span.text):
                    rest[index] = replace(span, text=stripped)
                    break
                rest.pop(index)
        spans = [*front, *rest]
        if self.media == "first" and self.media_suffix_alone is not None and spans and isinstance(spans[-1], MediaSpan):
            spans[-1] = replace(spans[-1], after=self.media_suffix_alone)
        return spans


def special_pattern(tokenizer: Any, literals: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Regex of every string that the tokenizer reads as a special token, and of `literals`; longest first."""
    return _special_pattern(tokenizer, len(tokenizer), literals)


@lru_cache(maxsize=32)
def _special_pattern(tokenizer: Any, size: int, literals: tuple[str, ...]) -> re.Pattern[str]:
    del size  # part of the key: tokens may have been added
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(special | set(literals), key=lambda name: (-len(name), name))
    return re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
