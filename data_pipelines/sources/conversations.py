"""What the sources of conversations, documents and videos share: media folders, record files, tags, samples."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media import image_item, media_item
from data_pipelines.sample import Annotation, Media, Part, Role, Sample, Text, Turn
from data_pipelines.sources import Record
from data_pipelines.video import MAX_BYTES

IMAGE, VIDEO = "<image>", "<video>"
ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class MediaFolder:
    """The folder that paths of images and videos start from; with `None`, every path is a `BadSample`.

    `option` names the setting in messages. Raises `DataError` if the folder is not there.
    """

    def __init__(self, path: str | Path | None, option: str) -> None:
        self.path, self.option = Path(path) if path is not None else None, option
        if self.path is not None and not self.path.is_dir():
            raise DataError(f"{option}: no such folder: {self.path}")

    def read(self, name: str) -> bytes:
        """The bytes of one file, named by its path from the folder or by a whole path in it. Raises `BadSample`."""
        if self.path is None:
            raise BadSample(f"names {name!r}, but no folder was given ({self.option}=<folder>)")
        path = self.path / name
        if not path.is_relative_to(self.path) or ".." in Path(name).parts:
            raise BadSample(f"path {name!r} leaves the folder {self.path}")
        try:
            if not path.is_file():
                raise BadSample(f"{path}: no such file")
            if path.stat().st_size > MAX_BYTES:
                raise BadSample(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
            return path.read_bytes()
        except (OSError, ValueError) as error:  # a null character in a path is a ValueError
            raise BadSample(f"{path}: {error}") from error


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list, of JSON Lines, or of a CSV file with a header or a parquet file. Raises `DataError`.

    A line of JSON Lines that does not parse stands as a `BadSample` in the list.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"file: {path}; allowed: {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return needs("pyarrow.parquet").read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        if path.suffix == ".jsonl":
            return [parse_json(line) for line in text.splitlines() if line.strip()]
        records = json.loads(text)
    except OSError as error:
        raise DataError(f"file: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"file: {path} does not parse: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"file: {path} holds a {type(records).__name__}; expected a list of records")
    return records


def parse_json(text: str) -> Any:
    """The value of JSON text, or the `BadSample` that stands for it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadSample(f"not JSON: {error}")


def needs(module: str) -> Any:
    """Import a module of a package of the `data` extra. Raises `DataError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{package} is not installed: pip install 'vlm-train[data]'") from error


def attempt(label: str, make: Callable[[], tuple[Sample, list[bytes]]]) -> Record:
    """What `make` gives, or the `BadSample` that stands for it, naming `label`."""
    try:
        return make()
    except BadSample as error:
        return BadSample(f"{label}: {error}")
    except MALFORMED as error:
        return BadSample(f"{label}: malformed: {type(error).__name__}: {error}")


def make_sample(
    key: str,
    blobs: Sequence[bytes],
    annotations: Sequence[Annotation],
    *,
    source: str,
    licence: str,
    meta: Mapping[str, Any] | None = None,
) -> tuple[Sample, list[bytes]]:
    """A sample whose media are `blobs`, in order. Raises `BadSample`."""
    media = tuple(media_item(number, blob) for number, blob in enumerate(blobs))
    sample = Sample(
        key=key, media=media, annotations=tuple(annotations), source=source, licence=licence, meta=dict(meta or {})
    )
    return sample, list(blobs)


def split_tags(text: str, numbers: Mapping[str, Iterator[int]]) -> tuple[Part, ...]:
    """Text with tags as parts: each tag takes the next of its `numbers`; line breaks around it belong to templates.

    Raises `BadSample` for more tags than numbers.
    """
    parts: list[Part] = []
    for piece in re.split(rf"\n?({'|'.join(map(re.escape, numbers))})\n?", text):
        if piece in numbers:
            item = next(numbers[piece], None)
            if item is None:
                raise BadSample(f"more {piece} tags than files")
            parts.append(Media(item=item))
        elif piece:
            parts.append(Text(text=piece))
    return tuple(parts)


def dialogue(conversations: Sequence[Mapping[str, str]], *, images: int = 0, videos: int = 0) -> Annotation:
    """A conversation in LLaVA's layout (`from`, `value`) or OpenAI's (`role`, `content`) about images, then videos.

    Tags in user turns take the media in order; a kind without any tag stands before the first user turn's text. Without
    images, `<image>` may stand for the videos, as in LLaVA-Video. Raises `BadSample` where tags and media differ.
    """
    turns = [(_role(turn), _text(turn)) for turn in conversations]
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise BadSample("no turn of a user")
    asked = {tag: sum(text.count(tag) for role, text in turns if role == "user") for tag in (IMAGE, VIDEO)}
    items = {IMAGE: range(images), VIDEO: range(images, images + videos)}
    if videos and not images and asked[IMAGE] and not asked[VIDEO]:
        items = {IMAGE: range(videos), VIDEO: range(0)}
    for tag, some in items.items():
        if some and not asked[tag]:
            turns[first] = ("user", f"{tag}\n" * len(some) + turns[first][1])
        elif asked[tag] != len(some):
            raise BadSample(f"{asked[tag]} {tag} tags in its user turns, {len(some)} files")
    numbers = {tag: iter(some) for tag, some in items.items()}
    return Annotation(
        turns=tuple(
            Turn(role=role, parts=split_tags(text, numbers) if role == "user" else (Text(text=text),))
            for role, text in turns
        )
    )


def _role(turn: Mapping[str, str]) -> Role:
    name = turn["from"] if "from" in turn else turn["role"]
    if name not in ROLES:
        raise BadSample(f"turn of {name!r}; allowed: {', '.join(ROLES)}")
    return ROLES[name]


def _text(turn: Mapping[str, str]) -> str:
    value = turn["value"] if "value" in turn else turn["content"]
    if not isinstance(value, str):
        raise BadSample(f"a turn holds a {type(value).__name__}; expected text")
    return value


def question(ask: str, answer: str, rejected: str | None = None, *, items: Sequence[int] = (0,)) -> Annotation:
    """A question about media and its answer, or a caption without `ask`; `rejected` is a worse answer."""
    parts = (*(Media(item=item) for item in items), *((Text(text=ask),) if ask else ()))
    worse = None if rejected is None else Turn(role="assistant", parts=(Text(text=rejected),))
    answers = Turn(role="assistant", parts=(Text(text=answer),))
    return Annotation(turns=(Turn(role="user", parts=parts), answers), rejected=worse)


def document(pieces: Iterable[str | bytes], joint: str) -> tuple[Annotation, list[bytes]]:
    """An interleaved document as one learned turn: texts, and images as bytes, in their order.

    `joint` stands between texts that follow each other; white space beside an image belongs to templates.
    """
    parts: list[Part] = []
    blobs: list[bytes] = []
    for shown, run in groupby(pieces, key=lambda piece: isinstance(piece, bytes)):
        if shown:
            for blob in run:
                parts.append(Media(item=len(blobs)))
                blobs.append(blob)  # type: ignore[arg-type]
        elif text := joint.join(piece.strip() for piece in run if isinstance(piece, str)).strip():
            parts.append(Text(text=text))
    return Annotation(turns=(Turn(role="assistant", parts=tuple(parts)),)), blobs


def readable(read: Callable[[], bytes], min_bytes: int = 0) -> bytes | None:
    """The image that `read` gives; None for one that is not there, is smaller, or is no image (a dead link's page)."""
    try:
        data = read()
        image_item(0, data)
    except BadSample:
        return None
    return data if len(data) >= min_bytes else None


def find_files(folder: str, *suffixes: str) -> list[Path]:
    """The files of a folder that end in one of `suffixes`, by name. Raises `DataError` if there are none."""
    if not Path(folder).is_dir():
        raise DataError(f"folder: no such folder: {folder}")
    found = sorted(path for path in Path(folder).iterdir() if path.name.endswith(suffixes) and path.is_file())
    if not found:
        raise DataError(f"folder: {folder} holds no {' or '.join(suffixes)} files")
    return found
