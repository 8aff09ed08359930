"""Captions as BLIP and BLIP-2 clean them before training: fewer kinds of text, so that a small text model learns more.

Source: `pre_caption` of github.com/salesforce/BLIP data/utils.py; the same in LAVIS and MiniGPT-4, blip_processors.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from data_pipelines.sample import Annotation, Text, Turn

MARKS = frozenset('.!"()*#:;~')
"""Characters that become a space."""


def clean_answers(annotation: Annotation, most: int) -> Annotation:
    """`annotation` with every answer cleaned, the rejected one too; see `clean_caption`."""
    rejected = annotation.rejected
    return replace(
        annotation,
        turns=tuple(_clean_turn(turn, most) if turn.role == "assistant" else turn for turn in annotation.turns),
        rejected=None if rejected is None else _clean_turn(rejected, most),
    )


def clean_caption(caption: Text, most: int) -> Text:
    """In lower case, `MARKS` as spaces, several white spaces as one, none at the ends, at most `most` words. Weighted
    stretches move along."""
    spelled = [(" " if mark in MARKS else mark, at) for at, char in enumerate(caption.text) for mark in char.lower()]
    chars: list[tuple[str, int]] = []
    for blank, run in groupby(spelled, key=lambda one: one[0].isspace()):
        some = list(run)
        chars += [(" ", some[0][1])] if blank and len(some) > 1 else some
    while chars and chars[-1][0] in " \n":
        chars.pop()
    while chars and chars[0][0] == " ":
        chars.pop(0)
    blanks = [number for number, (mark, _) in enumerate(chars) if mark == " "]
    chars = chars[: blanks[most - 1]] if len(blanks) >= most else chars
    places = [at for _, at in chars]
    moved = [(sum(at < a for at in places), sum(at < b for at in places), weight) for a, b, weight in caption.weights]
    return Text(text="".join(mark for mark, _ in chars), weights=tuple(one for one in moved if one[0] < one[1]))


def _clean_turn(turn: Turn, most: int) -> Turn:
    return replace(turn, parts=tuple(clean_caption(p, most) if isinstance(p, Text) else p for p in turn.parts))
