"""Conversations as messages: one JSON object a line, or a JSON list, the format for data of one's own.

`{"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]}` with
`images` (a path below the image folder, or a data URI, each), `id`, and `rejected`, an answer that the last one is
preferred to. `content` is text, in which `<image>` marks the places of `images` in order, or a list of parts:
`{"type": "text", "text"}`, `{"type": "image"}`, and with the image in it `{"type": "image", "image": "cat.png"}` or
`{"type": "image_url", "image_url": {"url"}}`. Images that nothing marks come before the first user turn's text.
Several conversations about the same images are a list of lists of messages.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.media import image_item
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Media, Part, Role, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.files import ImageFolder, place, read_records
from data_pipelines.sources.llava_json import split_tags

ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


class Messages(ListSource):
    """One sample per line of `file`. Image paths start from the folder `images`, or from that of `file`."""

    def __init__(
        self,
        *,
        file: str,
        images: str | None = None,
        name: str = "messages",
        licence: str = "",
        split: str = "train",
    ) -> None:
        self.name, self.licence, self.split = name, licence, split
        self._records = read_records(Path(file))
        self._images = ImageFolder(str(Path(file).parent) if images is None else images)

    def __len__(self) -> int:
        return len(self._records)

    def label(self, i: int) -> str:
        """The record's own id, or its line."""
        return place(self._records, i)

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file; blank lines are none."""
        record = self._records[i]
        key = safe_key(f"{i:07d}-{record['id']}" if "id" in record else f"{i:07d}")
        return sample(record, key, self._read, source=self.name, licence=self.licence)

    def _read(self, image: Any) -> bytes:
        return read_uri(image) if isinstance(image, str) and image.startswith("data:") else self._images.read(image)


def sample(
    record: Mapping[str, Any], key: str, read: Callable[[Any], bytes], *, source: str, licence: str
) -> tuple[Sample, list[bytes]]:
    """The sample of a record with `messages`, `conversations`, or `prompt` with `chosen` and `rejected`.

    `read` gives the bytes of one of its images. Raises what `ListSource.record` may raise.
    """
    images = record.get("images") or record.get("image") or []
    album = Album(images if isinstance(images, list) else [images])
    annotations = tuple(album.annotation(*pair) for pair in _conversations(record))
    blobs = [read(image) for image in album.images]
    return Sample(
        key=key,
        media=tuple(image_item(number, blob) for number, blob in enumerate(blobs)),
        annotations=annotations,
        source=source,
        licence=licence,
        meta={"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {},
    ), blobs


class Album:
    """The images of a record: those it lists, then those that its messages bring along, in order."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = list(images)
        self._listed = len(self.images)

    def annotation(self, messages: Sequence[Any], rejected: Mapping[str, Any] | None = None) -> Annotation:
        """One conversation. Raises `BadSample` where it ends without an answer, or marks part of the images only."""
        numbers = self._numbers()
        turns = [self._turn(message, numbers) for message in messages]
        if not turns or not _answers(turns[-1]):
            raise BadSample("its last turn is not an answer of the assistant")
        refused = self._turn(rejected, numbers) if rejected is not None else None
        if refused and not _answers(refused):
            raise BadSample("the rejected turn is not an answer of the assistant")
        return Annotation(turns=tuple(self._place_listed(turns)), rejected=refused)

    def _numbers(self) -> Iterator[int]:
        yield from range(self._listed)
        raise BadSample(f"marks more images than the {self._listed} it lists")

    def _place_listed(self, turns: list[Turn]) -> list[Turn]:
        """`turns` with all listed images: where they are marked, or else before the first user turn's text, as TRL
        places them (trl/data_utils.py, prepare_multimodal_messages)."""
        placed = {part.item for turn in turns for part in turn.parts if isinstance(part, Media)}
        missing = [number for number in range(self._listed) if number not in placed]
        if not missing:
            return turns
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if len(missing) < self._listed or first is None:
            raise BadSample(f"marks {self._listed - len(missing)} of the {self._listed} images it lists")
        parts = (*(Media(item=number) for number in missing), *turns[first].parts)
        return [*turns[:first], replace(turns[first], parts=parts), *turns[first + 1 :]]

    def _turn(self, message: Mapping[str, Any], numbers: Iterator[int]) -> Turn:
        name = message["role"] if message.get("role") is not None else message["from"]
        if name not in ROLES:
            raise BadSample(f"turn of {name!r}; allowed: {', '.join(ROLES)}")
        role = ROLES[name]
        content = message["content"] if message.get("content") is not None else message["value"]
        if isinstance(content, str):  # a tag in an answer is text, for example in code
            return Turn(role=role, parts=split_tags(content, numbers) if role == "user" else (Text(text=content),))
        return Turn(role=role, parts=tuple(self._part(part, numbers) for part in content))

    def _part(self, part: Mapping[str, Any], numbers: Iterator[int]) -> Part:
        match part["type"]:
            case "text" if isinstance(part["text"], str):
                return Text(text=part["text"])
            case "image":
                if part.get("image") is not None:
                    return self._add(part["image"])
                index = part.get("index")  # HuggingFaceH4/llava-instruct-mix-vsft
                if index is not None and not 0 <= index < self._listed:
                    raise BadSample(f"marks image {index} of the {self._listed} it lists")
                return Media(item=next(numbers) if index is None else index)
            case "image_url":
                return self._add(part["image_url"]["url"])
        raise BadSample(f"part of type {part['type']!r}; allowed: text, image, image_url")

    def _add(self, image: Any) -> Media:
        if image not in self.images[self._listed :]:
            self.images.append(image)
        return Media(item=self.images.index(image, self._listed))


def _answers(turn: Turn) -> bool:
    return turn.role == "assistant" and bool(turn.text.strip())


def _conversations(record: Mapping[str, Any]) -> Iterator[tuple[list[Any], Mapping[str, Any] | None]]:
    """The conversations of a record, each with the rejected answer, if there is one."""
    if record.get("chosen") is not None:
        yield _preference(record)
        return
    messages = record["messages"] if record.get("messages") is not None else record["conversations"]
    several = bool(messages) and isinstance(messages[0], list)
    rejected = record.get("rejected")
    if several and rejected is not None:
        raise BadSample("has several conversations and one rejected answer")
    for conversation in messages if several else [messages]:
        yield conversation, None if rejected is None else _answer(rejected)


def _preference(record: Mapping[str, Any]) -> tuple[list[Any], Mapping[str, Any]]:
    """TRL's preference layout; without a `prompt`, `chosen` and `rejected` both begin with it."""
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if prompt is None:
        if isinstance(chosen, str) or chosen[:-1] != rejected[:-1]:
            raise BadSample("has no prompt, and its chosen and rejected messages differ before the last one")
        return list(chosen), rejected[-1]
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*start, _answer(chosen)], _answer(rejected)


def _answer(value: Any) -> Mapping[str, Any]:
    """An answer given as text, as a message, or as a list of one message."""
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise BadSample(f"an answer of {len(value)} messages; expected one")
    message: Mapping[str, Any] = value[0]
    return message


def read_uri(uri: str) -> bytes:
    """The bytes of a base64 data URI. Raises `BadSample`."""
    start, comma, data = uri.partition(",")
    if not comma or not start.startswith("data:") or not start.endswith(";base64"):
        raise BadSample(f"{uri[:40]!r} is not data:<type>;base64,<bytes>")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"{uri[:40]!r}: {error}") from error
