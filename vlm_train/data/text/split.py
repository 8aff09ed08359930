"""Over-long samples as several shorter ones, cut between turns: never inside a turn, never inside an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Turn

Fits = Callable[[Sequence[Annotation]], bool]


class NoPiece(BadSample):
    """A sample has fewer pieces than asked for."""


def take_piece(annotations: Sequence[Annotation], number: int, fits: Fits, max_length: int) -> list[Annotation]:
    """Piece `number` of the annotations.

    Raises:
        BadSample: nothing fits. NoPiece: there are fewer pieces. `max_length` is for their messages.
    """
    found = split_annotations(annotations, fits)
    if not found:
        raise BadSample(f"no round of its turns is learned within data.max_length={max_length} tokens", kind="too_long")
    if number >= len(found):
        raise NoPiece(f"{len(found)} pieces of at most {max_length} tokens, so there is no piece {number}")
    return found[number]


def split_annotations(annotations: Sequence[Annotation], fits: Fits) -> list[list[Annotation]]:
    """The annotations in groups that fit, each as large as it can be.

    Independent annotations are kept whole as far as they fit. A conversation is cut between rounds (what is asked, and
    its answer); each piece begins with the system turn and with the media that earlier rounds have shown. A round that
    does not fit alone is left out.
    """
    groups: list[list[Annotation]] = []
    for annotation in annotations:
        if groups and fits([*groups[-1], annotation]):
            groups[-1].append(annotation)
        elif fits([annotation]):
            groups.append([annotation])
        else:
            groups += [[one] for one in _by_rounds(annotation, fits)]
    return groups


def _by_rounds(annotation: Annotation, fits: Fits) -> list[Annotation]:
    system, rounds = _split_rounds(annotation.turns)
    found: list[Annotation] = []
    first = 0
    while first < len(rounds):
        stop, fitting = first, None
        while stop < len(rounds):
            tried = replace(annotation, turns=(*system, *_prepend_media(rounds, first, stop + 1)))
            if not fits([tried]):
                break
            stop, fitting = stop + 1, tried
        if fitting is not None:
            found.append(fitting)
        first = max(stop, first + 1)
    return found


def _split_rounds(turns: Sequence[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """The system turns at the start, and the rounds: turns up to and including the next answer."""
    start = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    rounds: list[list[Turn]] = [[]]
    for turn in turns[start:]:
        rounds[-1].append(turn)
        if turn.role == "assistant":
            rounds.append([])
    return list(turns[:start]), [one for one in rounds if one]


def _prepend_media(rounds: Sequence[Sequence[Turn]], first: int, stop: int) -> list[Turn]:
    """Rounds `first` to `stop`, the first turn preceded by the media of all rounds before."""
    parts = [part for before in rounds[:first] for turn in before for part in turn.parts]
    shown = list(dict.fromkeys(part for part in parts if isinstance(part, Media)))
    head, *rest = (turn for one in rounds[first:stop] for turn in one)
    return [replace(head, parts=(*shown, *head.parts)), *rest]
