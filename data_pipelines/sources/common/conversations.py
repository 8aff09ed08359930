"""What sources of conversations share: roles, turns, and tags that mark the places of media in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Part, Role, Text, Turn

IMAGE, VIDEO = "<image>", "<video>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

Said = tuple[Role, str]
"""A turn whose tags still stand in its text."""


def read_turn(turn: Mapping[str, Any], roles: Mapping[str, Role] = ROLES) -> Said:
    """A turn in LLaVA's layout (`from`, `value`) or OpenAI's (`role`, `content`). Raises `BadSample`."""
    name = turn["from"] if "from" in turn else turn["role"]
    if name not in roles:
        raise BadSample(f"turn of {name!r}; allowed: {', '.join(roles)}")
    text = turn["value"] if "value" in turn else turn["content"]
    if not isinstance(text, str):
        raise BadSample(f"turn of {name!r} holds {text!r:.80}, not text")
    return roles[name], text


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


def to_turn(role: Role, text: str, numbers: Mapping[str, Iterator[int]]) -> Turn:
    """A turn with media where its tags stand; a tag that a user did not write is text, for example in code."""
    return Turn(role=role, parts=split_tags(text, numbers) if role == "user" else (Text(text=text),))


def count_tags(turns: Sequence[Said], tag: str) -> int:
    """The tags in the user turns."""
    return sum(text.count(tag) for role, text in turns if role == "user")


def describe_misplaced(turns: Sequence[Said], tag: str) -> str:
    """The end of a message about tags that were not found in user turns: where else they stand; "" if nowhere."""
    places = [
        f"turn {number}, of the {role},"
        for number, (role, text) in enumerate(turns, 1)
        if tag in text and role != "user"
    ]
    if not places:
        return ""
    return (
        f"; {' and '.join(places)} {'has' if len(places) == 1 else 'have'} {tag}, which marks images in user turns only"
    )


def refuse_media(record: Mapping[str, Any]) -> None:
    """Raise `BadSample` for a record with images or videos, for sources of text: they would be lost."""
    for field in ("image", "images", "video", "videos"):
        if record.get(field):
            raise BadSample(f"has {field}, which this source does not read")


def first_user(turns: Sequence[Said]) -> int:
    """The number of the first user turn. Raises `BadSample` if there is none."""
    for number, (role, _) in enumerate(turns):
        if role == "user":
            return number
    raise BadSample("no turn of a user")


def tag_first(turns: Sequence[Said], tag: str, count: int) -> list[Said]:
    """`turns` with `count` tags before the first user turn's text. Raises `BadSample` if no user speaks."""
    first = first_user(turns)
    return [*turns[:first], ("user", f"{tag}\n" * count + turns[first][1]), *turns[first + 1 :]]


def make_dialogue(conversation: Sequence[Mapping[str, Any]], *, images: int = 0, videos: int = 0) -> Annotation:
    """A conversation about images, then videos.

    Tags in user turns take the media in order; a kind without any tag stands before the first user turn's text. Without
    images, `<image>` may stand for the videos, as in LLaVA-Video. Raises `BadSample` where tags and media differ.
    """
    turns = [read_turn(turn) for turn in conversation]
    first_user(turns)
    asked = {tag: count_tags(turns, tag) for tag in (IMAGE, VIDEO)}
    items = {IMAGE: range(images), VIDEO: range(images, images + videos)}
    if videos and not images and asked[IMAGE] and not asked[VIDEO]:
        items = {IMAGE: range(videos), VIDEO: range(0)}
    for tag, some in reversed(items.items()):  # images come before videos
        misplaced = describe_misplaced(turns, tag) if asked[tag] < len(some) else ""
        if some and not asked[tag] and not misplaced:
            turns = tag_first(turns, tag, len(some))
        elif asked[tag] != len(some):
            raise BadSample(f"{asked[tag]} {tag} tags in its user turns, {len(some)} files{misplaced}")
    numbers = {tag: iter(some) for tag, some in items.items()}
    return Annotation(turns=tuple(to_turn(role, text, numbers) for role, text in turns))
