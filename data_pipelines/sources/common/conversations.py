"""What sources of conversations share: roles, turns, and tags that mark the places of media in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Part, Role, Text, Turn, is_weight

IMAGE, VIDEO = "<image>", "<video>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

WEIGHTS = ("weight", "loss_weight", "loss", "train")
"""Fields of a turn by which other trainers say how much of it is learned: OpenAI, LLaMA-Factory, ms-swift, axolotl."""
SYSTEM = ("system", "system_prompt")
"""Fields of a record that hold the text of its system turn."""


class Said(NamedTuple):
    """A turn whose tags still stand in its text."""

    role: Role
    text: str
    weight: float = 1.0


def read_weight(turn: Mapping[str, Any], role: Role) -> float:
    """How much of a turn is learned: 1, or what one of `WEIGHTS` says. Raises `BadSample`."""
    if "train_detail" in turn and turn["train_detail"] is not None:
        raise BadSample("a turn has train_detail, which is not read; weigh whole turns (weight) or use segment weights")
    said = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or not is_weight(value):
            raise BadSample(f"turn of {role!r}: {name} {value!r}; allowed: true, false, or a number from 0")
        if role != "assistant" and value:
            raise BadSample(f"turn of {role!r}: {name} {value!r}, but only turns of the assistant are learned")
    weights = {float(value) for value in said.values()}
    if len(weights) > 1:
        raise BadSample(f"turn of {role!r}: {said} contradict each other")
    return weights.pop() if weights and role == "assistant" else 1.0


def read_system(record: Mapping[str, Any], turns: Sequence[Any]) -> list[Said]:
    """The system turn that stands beside the `turns` of a record: one, or none. Raises `BadSample` for two."""
    texts = {record[name] for name in SYSTEM if record.get(name)}
    if not texts:
        return []
    text = texts.pop()
    if texts or not isinstance(text, str):
        raise BadSample(f"its {' and '.join(SYSTEM)} hold no one text")
    first = turns[0] if turns else {}
    if isinstance(first, Mapping) and "system" in (first.get("from"), first.get("role")):
        if text not in (first.get("value"), first.get("content")):
            raise BadSample("has a system turn, and another text as system or system_prompt")
        return []
    return [Said("system", text)] if text.strip() else []


def read_turn(turn: Mapping[str, Any], roles: Mapping[str, Role] = ROLES) -> Said:
    """A turn in LLaVA's layout (`from`, `value`) or OpenAI's (`role`, `content`). Raises `BadSample`."""
    name = turn["from"] if "from" in turn else turn["role"]
    if name not in roles:
        raise BadSample(f"turn of {name!r}; allowed: {', '.join(roles)}")
    text = turn["value"] if "value" in turn else turn["content"]
    if not isinstance(text, str):
        raise BadSample(f"turn of {name!r} holds {text!r:.80}, not text")
    return Said(roles[name], text, read_weight(turn, roles[name]))


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


def to_turn(said: Said, numbers: Mapping[str, Iterator[int]]) -> Turn:
    """A turn with media where its tags stand; a tag that a user did not write is text, for example in code."""
    parts = split_tags(said.text, numbers) if said.role == "user" else (Text(text=said.text),)
    return Turn(role=said.role, parts=parts, weight=said.weight)


def count_tags(turns: Sequence[Said], tag: str) -> int:
    """The tags in the user turns."""
    return sum(turn.text.count(tag) for turn in turns if turn.role == "user")


def describe_misplaced(turns: Sequence[Said], tag: str) -> str:
    """The end of a message about tags that were not found in user turns: where else they stand; "" if nowhere."""
    places = [
        f"turn {number}, of the {role},"
        for number, (role, text, _) in enumerate(turns, 1)
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
    for number, turn in enumerate(turns):
        if turn.role == "user":
            return number
    raise BadSample("no turn of a user")


def tag_first(turns: Sequence[Said], tag: str, count: int) -> list[Said]:
    """`turns` with `count` tags before the first user turn's text. Raises `BadSample` if no user speaks."""
    first = first_user(turns)
    asked = turns[first]._replace(text=f"{tag}\n" * count + turns[first].text)
    return [*turns[:first], asked, *turns[first + 1 :]]


def make_dialogue(record: Mapping[str, Any], *, images: int = 0, videos: int = 0) -> Annotation:
    """The `conversations` of a record, about images, then videos.

    Tags in user turns take the media in order; a kind without any tag stands before the first user turn's text. Without
    images, `<image>` may stand for the videos, as in LLaVA-Video. Raises `BadSample` where tags and media differ.
    """
    said = record["conversations"]
    turns = [*read_system(record, said), *map(read_turn, said)]
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
    return Annotation(turns=tuple(to_turn(turn, numbers) for turn in turns))
