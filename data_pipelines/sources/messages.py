"""Conversations as messages: one JSON object a line, or a JSON list, the format for data of one's own.

`{"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]}` with
`images` and `videos` (a path below the media folder, or a data URI, each), `id`, and `rejected`, an answer that the
last one is preferred to. `weight`, `loss_weight`, `loss` or `train` of a message say how much of an answer is learned;
`system` or `system_prompt` beside the messages is their system turn.

`content` is text, in which `<image>` and `<video>` mark the places of `images` and `videos` in order, or a list of
parts: `{"type": "text", "text"}`, `{"type": "image"}`, and with the image in it `{"type": "image", "image": "cat.png"}`
(or `url`, `path`, `base64`) or `{"type": "image_url", "image_url": {"url"}}`; videos alike. Images and videos that
nothing marks come before the first user turn's text. Several conversations about the same media are a list of lists of
messages. ms-swift's layout is the same (swift.readthedocs.io, Customization/Custom-dataset), with `rejected_response`
for `rejected`, which is read, too.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_pipelines.errors import BadSample
from data_pipelines.inputs.files import MediaFolder
from data_pipelines.sample import Annotation, Media, Part, Sample, Text, Turn
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import (
    IMAGE,
    ROLES,
    VIDEO,
    Said,
    describe_misplaced,
    read_system,
    read_weight,
    to_turn,
)
from data_pipelines.sources.common.samples import Origin, make_sample

TAGS = {"image": IMAGE, "video": VIDEO}


class Messages(FileSource):
    """One sample per record of `file`. Paths of images and videos start from the folder `media`, or that of `file`."""

    layouts = ("messages", "llava_json", "sharegpt")

    def __init__(
        self,
        *,
        file: str,
        media: str | None = None,
        name: str = "messages",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = name, license, split
        super().__init__(file, limit)
        self._media = MediaFolder(Path(file).parent if media is None else media, "media")

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file; blank lines are none."""
        record = self.raw[i]
        return parse_record(record, self.make_key(i, record), self._read_image, self)

    def _read_image(self, item: Any) -> bytes:
        return read_media(item, self._media)


def parse_record(
    record: Mapping[str, Any], key: str, read: Callable[[Any], bytes], origin: Origin
) -> tuple[Sample, list[bytes]]:
    """The sample of a record with `messages`, `conversations`, or `prompt` with `chosen` and `rejected`.

    `read` gives the bytes of one of its images or videos. Raises what `ListSource.read_record` may raise.
    """
    album = Album(images=_list_media(record, "image"), videos=_list_media(record, "video"))
    annotations = [album.make_annotation(*pair) for pair in _list_conversations(record)]
    blobs = [read(item) for item in album.media]
    meta = {"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {}
    return make_sample(origin, key, blobs, annotations, meta)


def _list_media(record: Mapping[str, Any], kind: str) -> list[Any]:
    found = record.get(f"{kind}s") or record.get(kind) or []
    found = found if isinstance(found, list) else [found]
    if None in found:
        raise BadSample(f"{kind} {found.index(None)} of its {len(found)} {kind}s is null")
    return found


class Album:
    """The media of a record: the images and videos it lists, then those that its messages bring along, in order."""

    def __init__(self, *, images: Sequence[Any], videos: Sequence[Any]) -> None:
        self.media = [*images, *videos]
        self._listed = {"image": range(len(images)), "video": range(len(images), len(self.media))}
        self._brought = len(self.media)

    def make_annotation(self, messages: Sequence[Any], rejected: Mapping[str, Any] | None = None) -> Annotation:
        """One conversation. Raises `BadSample` where it ends without an answer, or marks part of the images only."""
        numbers = {TAGS[kind]: self._count_media(kind) for kind in TAGS}
        turns = [self._make_turn(message, numbers) for message in messages]
        if not turns or not _is_answer(turns[-1]):
            raise BadSample("its last turn is not an answer of the assistant")
        refused = self._make_turn(rejected, numbers) if rejected is not None else None
        if refused and not _is_answer(refused):
            raise BadSample("the rejected turn is not an answer of the assistant")
        for kind in reversed(TAGS):  # images come before videos
            turns = self._place_listed(turns, kind)
        return Annotation(turns=tuple(turns), rejected=refused)

    def _count_media(self, kind: str) -> Iterator[int]:
        yield from self._listed[kind]
        raise BadSample(f"marks more {kind}s than the {len(self._listed[kind])} it lists")

    def _place_listed(self, turns: list[Turn], kind: str) -> list[Turn]:
        """`turns` with all listed media of a kind: where they are marked, or else before the first user turn's text, as
        TRL places images (trl/data_utils.py, prepare_multimodal_messages)."""
        listed = self._listed[kind]
        placed = {part.item for turn in turns for part in turn.parts if isinstance(part, Media)}
        missing = [number for number in listed if number not in placed]
        if not missing:
            return turns
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        misplaced = describe_misplaced([Said(turn.role, turn.text) for turn in turns], TAGS[kind])
        if len(missing) < len(listed) or first is None or misplaced:
            raise BadSample(f"marks {len(listed) - len(missing)} of the {len(listed)} {kind}s it lists{misplaced}")
        parts = (*(Media(item=number) for number in missing), *turns[first].parts)
        return [*turns[:first], replace(turns[first], parts=parts), *turns[first + 1 :]]

    def _make_turn(self, message: Mapping[str, Any], numbers: Mapping[str, Iterator[int]]) -> Turn:
        name = message["role"] if message.get("role") is not None else message["from"]
        if not isinstance(name, str) or name not in ROLES:
            raise BadSample(f"turn of {name!r}; allowed: {', '.join(ROLES)}")
        content = message["content"] if message.get("content") is not None else message["value"]
        weight = read_weight(message, ROLES[name])
        if isinstance(content, str):
            return to_turn(Said(ROLES[name], content, weight), numbers)
        if isinstance(content, Mapping) or not isinstance(content, Iterable):
            raise BadSample(f"content of type {type(content).__name__}; allowed: text, or a list of parts")
        return Turn(role=ROLES[name], parts=tuple(self._make_part(part, numbers) for part in content), weight=weight)

    def _make_part(self, part: Mapping[str, Any], numbers: Mapping[str, Iterator[int]]) -> Part:
        if not isinstance(part, Mapping):
            raise BadSample(f"a part of type {type(part).__name__}; allowed: an object with type and text or image")
        match part["type"]:
            case "text":
                if not isinstance(part.get("text"), str):
                    raise BadSample(f"a part of type 'text' holds {part.get('text')!r:.80}, not text")
                return Text(text=part["text"])
            case "image" | "video" as kind:
                for name in (kind, "url", "path", "base64"):  # the last three are those of transformers
                    if part.get(name) is not None:
                        return self._add_media(f"data:;base64,{part[name]}" if name == "base64" else part[name])
                if part.get("index") is not None:  # HuggingFaceH4/llava-instruct-mix-vsft
                    return self._numbered_media(kind, part["index"])
                return Media(item=next(numbers[TAGS[kind]]))
            case "image_url" | "video_url" as kind:
                return self._add_media(part[kind]["url"])
        raise BadSample(f"part of type {part['type']!r}; allowed: text, image, image_url, video, video_url")

    def _numbered_media(self, kind: str, index: int) -> Media:
        listed = self._listed[kind]
        if not 0 <= index < len(listed):
            raise BadSample(f"marks {kind} {index} of the {len(listed)} it lists")
        return Media(item=listed[index])

    def _add_media(self, item: Any) -> Media:
        if item not in self.media[self._brought :]:
            self.media.append(item)
        return Media(item=self.media.index(item, self._brought))


def _is_answer(turn: Turn) -> bool:
    return turn.role == "assistant" and bool(turn.text.strip())


def _list_conversations(record: Mapping[str, Any]) -> Iterator[tuple[list[Any], Mapping[str, Any] | None]]:
    """The conversations of a record, each with the rejected answer, if there is one."""
    if record.get("chosen") is not None:
        chosen, refused = _split_preference(record)
        yield [*_system_message(record, chosen), *chosen], refused
        return
    messages = record["messages"] if record.get("messages") is not None else record.get("conversations")
    if not isinstance(messages, list):
        raise BadSample(f"has no list of messages; its fields: {', '.join(map(str, record)) or 'none'}")
    several = bool(messages) and isinstance(messages[0], list)
    rejected = record.get("rejected", record.get("rejected_response"))
    if several and rejected is not None:
        raise BadSample("has several conversations and one rejected answer")
    for conversation in messages if several else [messages]:
        yield (
            [*_system_message(record, conversation), *conversation],
            None if rejected is None else _answer_message(rejected),
        )


def _system_message(record: Mapping[str, Any], messages: Sequence[Any]) -> list[dict[str, str]]:
    return [{"role": said.role, "content": said.text} for said in read_system(record, messages)]


def _split_preference(record: Mapping[str, Any]) -> tuple[list[Any], Mapping[str, Any]]:
    """TRL's preference layout; without a `prompt`, `chosen` and `rejected` both begin with it."""
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if prompt is None:
        if isinstance(chosen, str) or chosen[:-1] != rejected[:-1]:
            raise BadSample("has no prompt, and its chosen and rejected messages differ before the last one")
        return list(chosen), rejected[-1]
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*start, _answer_message(chosen)], _answer_message(rejected)


def _answer_message(value: Any) -> Mapping[str, Any]:
    """An answer given as text, as a message, or as a list of one message."""
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise BadSample(f"an answer of {len(value)} messages; expected one")
    message: Mapping[str, Any] = value[0]
    return message


def read_media(item: Any, folder: MediaFolder) -> bytes:
    """An image or video given as a path, `file://` address or data URI, or as an object of one of these: `{"path"}`,
    `{"url"}`, `{"bytes"}`. Raises `BadSample`."""
    if isinstance(item, Mapping):
        item = next((item[name] for name in ("bytes", "path", "url") if item.get(name) is not None), None)
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise BadSample(f"an image or video of type {type(item).__name__}; allowed: a path, or an object with one")
    if item.startswith("data:"):
        return read_uri(item)
    if re.match(r"[A-Za-z][\w+.-]+://", item) and not item.startswith("file://"):
        raise BadSample(f"{item[:80]!r} is an address, and nothing is downloaded; give files (media=<folder>)")
    return folder.read(unquote(item.removeprefix("file://")) if item.startswith("file://") else item)


def read_uri(uri: str) -> bytes:
    """The bytes of a base64 data URI. Raises `BadSample`."""
    start, comma, data = uri.partition(",")
    if not comma or not start.startswith("data:") or not start.endswith(";base64"):
        raise BadSample(f"{uri[:40]!r} is not data:<type>;base64,<bytes>")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"{uri[:40]!r}: {error}") from error
