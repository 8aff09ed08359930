"""What sources of questions and regions share: files, prompts with fields, human answers, samples.

A sample is one image; every question or region is an independent annotation of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media import MAX_BYTES, image_item
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Box, Media, Part, Sample, Text, Turn
from data_pipelines.sources import Source

ANSWERS = ("majority", "all_weighted")
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)

Raw = TypeVar("Raw")
Annotated = list[tuple[Annotation, dict[str, Any]]]
"""Annotations, each with what `meta["annotations"]` says of it: its id, all human answers."""


class ImageFolder:
    """The folder that image names start from."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"images: no such folder: {self.path}")

    def read(self, *names: str) -> bytes:
        """The bytes of the first of `names` that is there. Raises `BadSample`."""
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BadSample(f"image path {name!r} leaves the image folder")
        path = self.path / names[0]
        try:
            path = next((self.path / name for name in names if (self.path / name).is_file()), path)
            if path.stat().st_size > MAX_BYTES:
                raise BadSample(f"image {path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
            return path.read_bytes()
        except OSError as error:
            raise BadSample(f"image {path}: {error.strerror}") from error


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

    def fill(self, **values: str | Box) -> tuple[Part, ...]:
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


def read_json(path: str, option: str) -> Any:
    """The value of a JSON file. Raises `DataError` that names the option."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{option}: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option}: {path} is not JSON: {error}") from error


def read_list(path: str, option: str, field: str | None = None) -> list[Any]:
    """The list in a JSON file, or in one field of it. Raises `DataError`."""
    data = read_json(path, option)
    records = data.get(field) if field is not None and isinstance(data, dict) else data
    if not isinstance(records, list):
        raise DataError(f"{option}: {path}: expected a list{f' under {field!r}' if field else ''}")
    return records


def check(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value`. Raises `DataError` unless it is allowed."""
    if value not in allowed:
        raise DataError(f"{option}: got {value!r}; allowed: {', '.join(allowed)}")
    return value


def of_split(records: Iterable[Any], field: str, split: Any) -> list[Any]:
    """The records of one split. Raises `DataError` if there are none."""
    there = [record for record in records if isinstance(record, dict)]
    kept = [record for record in there if record.get(field) == split]
    if not kept:
        found = sorted({str(record.get(field)) for record in there})
        raise DataError(f"split: no record has {field} = {split!r}; the file has: {', '.join(found) or 'no records'}")
    return kept


def grouped(records: Iterable[Any], field: str) -> list[list[Any]]:
    """Records with the same `field`, in order of first appearance; one without it stands alone and fails when read."""
    groups: dict[Any, list[Any]] = {}
    for number, record in enumerate(records):
        value = record.get(field) if isinstance(record, dict) else None
        groups.setdefault(value if isinstance(value, (int, str)) else (number,), []).append(record)
    return list(groups.values())


def text(value: Any) -> str:
    """`value` without outer blanks. Raises `BadSample` unless it is text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"expected text, got {value!r}")
    value.encode()  # lone surrogates, which JSON can spell and UTF-8 cannot, are a ValueError
    return value.strip()


def texts(value: Any) -> list[str]:
    """A list of texts, empty ones included. Raises `BadSample`."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadSample(f"expected a list of texts, got {value!r}")
    return value


def whole(value: Any) -> int:
    """A whole number, or digits. Raises `BadSample`."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int):
        raise BadSample(f"expected a whole number, got {value!r}")
    return value


def exchange(prompt: Sequence[Part], answer: str | Box, weight: float = 1.0) -> Annotation:
    """A user turn about the image and its answer."""
    reply = answer if isinstance(answer, Box) else Text(text=answer)
    turns = Turn(role="user", parts=(Media(item=0), *prompt)), Turn(role="assistant", parts=(reply,))
    return Annotation(turns=turns, weight=weight)


def answered(prompt: Sequence[Part], answers: Sequence[str], mode: str, note: dict[str, Any]) -> Annotated:
    """A question with its human answers: the most frequent one, or all, weighted by how many people gave them."""
    note = {**note, "answers": list(answers)}
    counts = Counter(text(answer) for answer in answers if answer.strip())
    if not counts:
        raise BadSample("no answers")
    if mode == "majority":  # of equally frequent answers the first given
        return [(exchange(prompt, counts.most_common(1)[0][0]), note)]
    return [(exchange(prompt, answer, count / len(answers)), note) for answer, count in counts.items()]


def one_image(
    source: Source,
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
            json.dumps([note for _, note in found], ensure_ascii=False).encode()  # see `text`
            annotations += [annotation for annotation, _ in found]
            notes += [note for _, note in found]
        except BadSample as error:
            skipped.append(f"{number}: {error}")
        except MALFORMED as error:
            skipped.append(f"{number}: malformed: {type(error).__name__}: {error}")
    if not annotations:
        raise BadSample(f"no usable annotation among {len(skipped)}" + "".join(f"; {reason}" for reason in skipped[:3]))
    return Sample(
        key=safe_key(key),
        media=(image_item(0, blob),),
        annotations=tuple(annotations),
        source=source.name,
        licence=source.licence,
        meta={**meta, "annotations": notes} | ({"skipped": skipped} if skipped else {}),
    ), [blob]
