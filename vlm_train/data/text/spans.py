"""Spans: what a template hands to the tokenizer, how the parts of a turn become spans, and what text must not spell."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

from data_pipelines.sample import Box, Media, Turn
from vlm_train.errors import ConfigError

MediaPlace = Literal["first", "inline", "drop"]


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
    """Where media item `item` stands."""

    item: int


Span = TextSpan | MediaSpan


@dataclass(frozen=True, kw_only=True)
class ContentStyle:
    """How the parts of a turn become spans: shared by all templates.

    Attributes:
        media: first (to the front of their turn, the text stripped, as LLaVA does) | inline | drop.
        media_prefix, media_suffix: text around every media item.
        media_suffix_alone: text behind the last media item of a turn that has no text, with `first`; None:
            `media_suffix`.
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

    def make_spans(self, turn: Turn, weight: float = 0.0, *, text: bool = True) -> list[Span]:
        """The spans of one turn's parts; `weight` is the loss weight of its text; `text=False` keeps only media."""
        spans: list[Span] = []
        for part in turn.parts:
            if isinstance(part, Media):
                spans += [] if self.media == "drop" else [MediaSpan(part.item)]
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
        front = [span for span in spans if isinstance(span, MediaSpan)] if self.media == "first" else []
        rest = [span for span in spans if isinstance(span, TextSpan)] if front else spans
        for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
            while (front or self.strip) and rest and isinstance(span := rest[index], TextSpan):  # up to a media item
                if stripped := strip(span.text):
                    rest[index] = replace(span, text=stripped)
                    break
                rest.pop(index)
        spans = [*front, *rest]
        before, after = TextSpan(self.media_prefix), TextSpan(self.media_suffix)
        framed = [one for span in spans for one in ((before, span, after) if isinstance(span, MediaSpan) else (span,))]
        if self.media == "first" and self.media_suffix_alone is not None and framed and framed[-1] is after:
            framed[-1] = TextSpan(self.media_suffix_alone)
        return framed


def special_pattern(tokenizer: Any, literals: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Regex of every string that the tokenizer reads as a special token, and of `literals`; longest first."""
    return _special_pattern(tokenizer, len(tokenizer), literals)


@lru_cache(maxsize=32)
def _special_pattern(tokenizer: Any, size: int, literals: tuple[str, ...]) -> re.Pattern[str]:
    del size  # part of the key: tokens may have been added
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(special | set(literals), key=lambda name: (-len(name), name))
    return re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
