"""The questions of a sample: what is asked, what was said before, and which answers count as right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from vlm_train.evaluation.metrics.texts import normalize_text

Dialogue = Literal["last", "own_history", "reference_history", "no_history"]

ASKED: Mapping[str, str] = {
    "last": "last question of a dialogue only, after the reference answers",
    "own_history": "every question of a dialogue, after the model's own answers",
    "reference_history": "every question of a dialogue, after the reference answers",
    "no_history": "every question of a dialogue by itself",
}
"""Which questions of a dialogue are asked -> how tables say it."""


@dataclass(frozen=True)
class Question:
    """One question of a sample.

    Args:
        annotation: number of its annotation.
        place: how many questions of the annotation come before it.
        turns: what is said up to the answer; the last turn is the reference answer, if there is one.
        references: further answers that count as right.
    """

    annotation: int
    place: int
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of the last user turn."""
        return next((turn.text.strip() for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def reference(self) -> str:
        """The text of the last turn if it is an answer, else ""."""
        return self.turns[-1].text.strip() if self.turns and self.turns[-1].role == "assistant" else ""

    def sample_with_answers(self, sample: Sample, said: Sequence[str] | None) -> Sample:
        """The sample with this question alone; `said` takes the place of the answers before it."""
        turns = list(self.turns)
        if said is not None:
            places = [place for place in answer_places(self.turns) if place < len(turns) - 1]
            for place, text in zip(places, said, strict=False):
                turns[place] = replace(turns[place], parts=(Text(text=text),))
        return replace(sample, annotations=(replace(sample.annotations[self.annotation], turns=tuple(turns)),))


def answer_places(turns: Sequence[Turn]) -> list[int]:
    """The numbers of the turns that answer a user turn before them."""
    return [n for n, turn in enumerate(turns) if n and turn.role == "assistant" and turns[n - 1].role == "user"]


def is_dialogue(sample: Sample) -> bool:
    """Whether an annotation of the sample has several questions."""
    return any(len(answer_places(annotation.turns)) > 1 for annotation in sample.annotations)


def list_questions(
    sample: Sample, dialogue: Dialogue, *, join: bool = False, all_answers: bool = False
) -> list[Question]:
    """The questions of all annotations.

    `join`: annotations that ask the same are one question, and the answers of all of them count as right.
    `all_answers`: so do those that the sample's source lists for an annotation.
    """
    found: dict[object, Question] = {}
    for number, annotation in enumerate(sample.annotations):
        for place, turns in enumerate(_split_questions(annotation, dialogue)):
            last = len(turns) == len(annotation.turns)
            more = accepted_answers(sample, number) if all_answers and last else ()
            one = Question(number, place, turns, more)
            joins = join and one.reference and len(answer_places(annotation.turns)) < 2
            key = turns[:-1] if joins else (number, place)
            earlier = found.get(key)
            found[key] = (
                one if earlier is None else replace(earlier, references=(*earlier.references, one.reference, *more))
            )
    return list(found.values())


def _split_questions(annotation: Annotation, dialogue: Dialogue) -> Iterator[tuple[Turn, ...]]:
    places = answer_places(annotation.turns)
    if dialogue == "last" or not places:
        yield annotation.turns
        return
    for place in places:
        turns = annotation.turns[: place + 1]
        yield _without_history(turns) if dialogue == "no_history" else turns


def _without_history(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A question and its answer, with the system turns and the media of what was said before."""
    *before, ask, answer = turns
    media = tuple(part for turn in before if turn.role == "user" for part in turn.parts if isinstance(part, Media))
    system = (turn for turn in before if turn.role == "system")
    return (*system, replace(ask, parts=(*media, *ask.parts)), answer)


def accepted_answers(sample: Sample, k: int) -> tuple[str, ...]:
    """The answers that the sample's source lists for annotation `k`: `meta["annotations"][k]["answers"]`."""
    notes = sample.meta.get("annotations") or []
    return tuple(map(str, notes[k].get("answers") or ())) if k < len(notes) else ()


def count_answers(reference: str, others: Sequence[str]) -> tuple[str, ...]:
    """All answers that count, the reference first; where it is among `others`, not once more: metrics may count how
    many people gave an answer."""
    left = list(others)
    again = next((text for text in left if normalize_text(text) == normalize_text(reference)), None)
    if again is not None:
        left.remove(again)
    return (reference, *left)
