"""ShareGPT conversations, text only: a JSON list, or JSON Lines, of `{"id"?, "conversations": [{"from", "value"}]}`.

What Vicuna was trained on has this layout (ShareGPT_V3_unfiltered_cleaned_split.json), and many sets copy it, some with
`role` and `content` or `messages`. What stands before the first user turn and is no system turn is dropped, and so is
a question without an answer at the end (github.com/lm-sys/FastChat, fastchat/train/train.py and fastchat/data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Role, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.files import place, read_records

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
}


class ShareGPT(ListSource):
    """One sample per conversation of `file`; `limit` takes the first ones.

    A conversation whose turns do not alternate, or with an unknown speaker, is a `BadSample`.
    """

    def __init__(
        self,
        *,
        file: str,
        name: str = "sharegpt",
        licence: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.licence, self.split = name, licence, split
        self._records = read_records(Path(file))
        self._count = min(len(self._records), len(self._records) if limit is None else limit)

    def __len__(self) -> int:
        return self._count

    def label(self, i: int) -> str:
        """The record's own id, where it has one."""
        return place(self._records, i)

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Conversation i of the file."""
        record = self._records[i]
        conversation = record["messages"] if "messages" in record else record["conversations"]
        turns = _trim([_turn(message) for message in conversation])
        return Sample(
            key=safe_key(f"{i:07d}-{record['id']}" if "id" in record else f"{i:07d}"),
            annotations=(Annotation(turns=tuple(turns)),),
            source=self.name,
            licence=self.licence,
            meta={"id": record.get("id")},
        ), []


def _turn(message: dict[str, Any]) -> Turn:
    name = message["from"] if "from" in message else message["role"]
    if name not in ROLES:
        raise BadSample(f"turn from {name!r}; allowed: {', '.join(ROLES)}")
    text = message["value"] if "value" in message else message["content"]
    if not isinstance(text, str):
        raise BadSample(f"turn of {name!r} holds {text!r}, not text")
    return Turn(role=ROLES[name], parts=(Text(text=text),))


def _trim(turns: list[Turn]) -> list[Turn]:
    """System turn, if there is one, then questions and answers in turn."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    talk = turns[len(system) :]
    while talk and talk[0].role == "assistant":
        talk = talk[1:]
    if talk and talk[-1].role == "user":
        talk = talk[:-1]
    if not talk:
        raise BadSample("no question with an answer")
    for number, turn in enumerate(talk):
        if turn.role != ("user", "assistant")[number % 2]:
            raise BadSample(f"turn {number + len(system)} is of {turn.role}; questions and answers must alternate")
        if not turn.text.strip():
            raise BadSample(f"turn {number + len(system)} is empty")
    return [*system, *talk]
