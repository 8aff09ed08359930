"""Texts far longer than a model reads, shortened or refused before a tokenizer spends seconds on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Part, Text, Turn
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from vlm_train.data.text.render import RenderOptions

CHARACTERS_PER_TOKEN = 256
"""More than the longest token of the known vocabularies has: a longer text is beyond `data.max_length` for certain."""


def bound_texts(annotations: Sequence[Annotation], how: RenderOptions, *, cut: bool) -> list[Annotation]:
    """The annotations with no more text than `how.max_length` tokens can hold.

    With `truncate` the end is cut off, if `cut`: tokens behind it would be.

    Raises:
        BadSample, ConfigError: too long, as `how.over_length` says.
    """
    most = None if how.max_length is None else how.max_length * CHARACTERS_PER_TOKEN
    lengths = [
        len(turn.text) for one in annotations for turn in (*one.turns, *([one.rejected] if one.rejected else ()))
    ]
    if most is None or sum(lengths) <= most or (how.over_length == "split" and max(lengths) <= most):
        return list(annotations)
    message = f"{sum(lengths)} characters, but data.max_length is {how.max_length} tokens"
    if how.over_length == "error":
        raise ConfigError(f"{message} (data.over_length=error)")
    if how.over_length != "truncate" or how.generation or not cut:
        raise BadSample(message, kind="too_long")
    found, left = list[Annotation](), most
    for one in annotations:
        turns = []
        for turn in one.turns:
            turns.append(_cut_turn(turn, left))
            left -= len(turns[-1].text)
        found.append(replace(one, turns=tuple(turns), rejected=one.rejected and _cut_turn(one.rejected, most)))
    return found


def _cut_turn(turn: Turn, most: int) -> Turn:
    return turn if len(turn.text) <= most else replace(turn, parts=tuple(_cut_parts(turn.parts, most)))


def _cut_parts(parts: Sequence[Part], left: int) -> Iterator[Part]:
    """The parts with their first `left` characters; what is no text stays."""
    for part in parts:
        if isinstance(part, Text):
            text = part.text[:left]
            weights = tuple((a, min(b, len(text)), weight) for a, b, weight in part.weights if a < len(text))
            left -= len(text)
            part = Text(text=text, weights=weights)
        yield part
