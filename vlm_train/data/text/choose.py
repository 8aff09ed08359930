"""Which annotations of a sample are read, and which of their turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Text, Turn

Annotations = Literal["independent", "dialogue", "first", "drawn"]


def choose_annotations(
    all_annotations: Sequence[Annotation], mode: Annotations, number: int | None
) -> list[Annotation]:
    """Annotation `number`, or those that `mode` names. Raises `BadSample` if there is none of that number."""
    if number is not None and not 0 <= number < len(all_annotations):
        raise BadSample(f"no annotation {number}; it has {len(all_annotations)}", kind="malformed")
    if number is not None or mode in ("first", "drawn"):
        return [all_annotations[number or 0]]
    return [join_annotations(all_annotations)] if mode == "dialogue" else list(all_annotations)


def join_annotations(annotations: Sequence[Annotation]) -> Annotation:
    """All annotations as one conversation: media that an earlier one showed and later system turns are left out."""
    turns: list[Turn] = []
    shown: set[int] = set()
    for annotation in annotations:
        new: set[int] = set()
        for turn in annotation.turns:
            if turn.role == "system" and turns:
                continue
            repeats = any(isinstance(part, Media) and part.item in shown for part in turn.parts)
            if repeats:
                kept = tuple(p for p in turn.parts if not (isinstance(p, Media) and p.item in shown))
                turn = _strip_turn(replace(turn, parts=kept))
            new |= {part.item for part in turn.parts if isinstance(part, Media)}
            turns.append(replace(turn, weight=turn.weight * annotation.weight))
        shown |= new
    return Annotation(turns=tuple(turns))


def swap_rejected(annotation: Annotation) -> Annotation:
    """The annotation with its rejected answer. Raises `BadSample` without one."""
    if annotation.rejected is None:
        raise BadSample("no rejected answer, but the objective compares two", kind="no_rejected")
    return replace(annotation, turns=(*annotation.turns[:-1], annotation.rejected))


def turns_until_answer(annotation: Annotation) -> tuple[Turn, ...]:
    """The turns up to the last answer: nothing after it is learned."""
    turns = annotation.turns
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    return turns


def _strip_turn(turn: Turn) -> Turn:
    """`turn` without white space at both ends of its text; weighted stretches move along."""
    parts = list(turn.parts)
    for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and isinstance(part := parts[index], Text):
            text = strip(part.text)
            moved = len(part.text) - len(text) if index == 0 else 0
            weights = tuple((max(a - moved, 0), max(b - moved, 0), w) for a, b, w in part.weights)
            parts[index] = Text(text=text, weights=weights)
    return replace(turn, parts=tuple(parts))
