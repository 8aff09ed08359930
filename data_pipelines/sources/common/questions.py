"""What sources of questions and regions share: prompts with fields, human answers, one sample per image.

A sample is one image; every question or region is an independent annotation of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Annotation, Box, Part, Sample, Text, check_json
from data_pipelines.sources.common.samples import MALFORMED, Origin, make_exchange, make_sample

ANSWERS = ("majority", "all_weighted")

Raw = TypeVar("Raw")
Annotated = list[tuple[Annotation, dict[str, Any]]]
"""Annotations, each with what `meta["annotations"]` says of it: its id, all human answers."""


class Prompt:
    """A pattern such as `"{question} Answer briefly."`; its fields become text or boxes.

    A line with a field that is empty is left out. `option` names the setting in messages, `needs` the fields that must
    occur, `may` those that can. Raises `DataError`.
    """

    FIELD = re.compile(r"\{(\w+)\}")

    def __init__(self, pattern: str, option: str, *, needs: Sequence[str], may: Sequence[str] = ()) -> None:
        self.pattern = pattern
        self.fields = set(self.FIELD.findall(pattern))
        if not set(needs) <= self.fields <= {*needs, *may}:
            allowed = ", ".join([*(f"{{{name}}}" for name in needs), *(f"{{{name}}} (optional)" for name in may)])
            raise DataError(f"{option}: got {pattern!r}; its fields must be: {allowed}")

    def fill_prompt(self, **values: str | Box) -> tuple[Part, ...]:
        """The parts of a turn."""
        lines = (line for line in self.pattern.split("\n") if all(values[n] != "" for n in self.FIELD.findall(line)))
        parts: list[Part] = []
        text = ""
        for number, piece in enumerate(self.FIELD.split("\n".join(lines))):
            value = values[piece] if number % 2 else piece
            if isinstance(value, str):
                text += value
                continue
            parts += [Text(text=text)] if text else []
            parts.append(value)
            text = ""
        return (*parts, Text(text=text)) if text else tuple(parts)


def of_split(records: Iterable[Any], field: str, split: Any) -> list[Any]:
    """The records of one split. Raises `DataError` if there are none."""
    there = [record for record in records if isinstance(record, dict)]
    kept = [record for record in there if record.get(field) == split]
    if not kept:
        found = sorted({str(record.get(field)) for record in there})
        raise DataError(f"split: no record has {field} = {split!r}; the file has: {', '.join(found) or 'no records'}")
    return kept


def group_records(records: Iterable[Any], field: str) -> list[list[Any]]:
    """Records with the same `field`, in order of first appearance; one without it stands alone and fails when read."""
    groups: dict[Any, list[Any]] = {}
    for number, record in enumerate(records):
        value = record.get(field) if isinstance(record, dict) else None
        groups.setdefault(value if isinstance(value, (int, str)) else (number,), []).append(record)
    return list(groups.values())


def require_text(value: Any) -> str:
    """`value` without outer blanks. Raises `BadSample` unless it is text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"expected text, got {value!r}")
    check_json(value)
    return value.strip()


def require_texts(value: Any) -> list[str]:
    """A list of texts, empty ones included. Raises `BadSample`."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadSample(f"expected a list of texts, got {value!r}")
    return value


def require_whole_number(value: Any) -> int:
    """A whole number, or digits. Raises `BadSample`."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int):
        raise BadSample(f"expected a whole number, got {value!r}")
    return value


def make_answers(prompt: Sequence[Part], answers: Sequence[str], mode: str, note: dict[str, Any]) -> Annotated:
    """A question with its human answers: the most frequent one, or all, weighted by how many people gave them."""
    note = {**note, "answers": list(answers)}
    counts = Counter(require_text(answer) for answer in answers if answer.strip())
    if not counts:
        raise BadSample("no answers")
    if mode == "majority":  # of equally frequent answers the first given
        return [(make_exchange(prompt, counts.most_common(1)[0][0]), note)]
    return [(make_exchange(prompt, answer, weight=count / len(answers)), note) for answer, count in counts.items()]


def one_image(
    origin: Origin,
    key: str,
    blob: bytes,
    raw: Iterable[Raw],
    annotate: Callable[[Raw], Annotated],
    meta: Mapping[str, Any],
) -> tuple[Sample, list[bytes]]:
    """The sample of one image. Questions or regions that cannot be used are left out and named in `meta["skipped"]`.

    Raises `BadSample` if none is left.
    """
    annotations: list[Annotation] = []
    notes: list[dict[str, Any]] = []
    skipped: list[str] = []
    for number, item in enumerate(raw):
        try:
            found = annotate(item)
            check_json([note for _, note in found])
            annotations += [annotation for annotation, _ in found]
            notes += [note for _, note in found]
        except BadSample as error:
            skipped.append(f"{number}: {error}")
        except MALFORMED as error:
            skipped.append(f"{number}: malformed: {type(error).__name__}: {error}")
    if not annotations:
        raise BadSample(f"no usable annotation among {len(skipped)}" + "".join(f"; {reason}" for reason in skipped[:3]))
    about = {**meta, "annotations": notes} | ({"skipped": skipped} if skipped else {})
    return make_sample(origin, key, [blob], annotations, about)
