"""ShareGPT conversations, text only: a JSON list, or JSON Lines, of `{"id"?, "conversations": [{"from", "value"}]}`.

What Vicuna was trained on has this layout (ShareGPT_V3_unfiltered_cleaned_split.json), and many sets copy it, some with
`role` and `content` or `messages`. What stands before the first user turn and is no system turn is dropped, and so is
a question without an answer at the end (github.com/lm-sys/FastChat, fastchat/train/train.py and fastchat/data).
"""

from __future__ import annotations

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Role, Sample, Text, Turn
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import ROLES, Said, read_system, read_turn, refuse_media
from data_pipelines.sources.common.samples import make_sample

SPEAKERS: dict[str, Role] = {
    **ROLES,
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


class ShareGPT(FileSource):
    """One sample per conversation of `file`; `limit` takes the first ones.

    A conversation whose turns do not alternate, or with an unknown speaker, is a `BadSample`.
    """

    layouts = ("sharegpt", "messages")

    def __init__(
        self,
        *,
        file: str,
        name: str = "sharegpt",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = name, license, split
        super().__init__(file, limit)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Conversation i of the file."""
        record = self.raw[i]
        refuse_media(record)
        conversation = record["messages"] if "messages" in record else record["conversations"]
        said = [*read_system(record, conversation), *(read_turn(turn, SPEAKERS) for turn in conversation)]
        turns = (Turn(role=one.role, parts=(Text(text=one.text),), weight=one.weight) for one in _trim_turns(said))
        annotation = Annotation(turns=tuple(turns))
        return make_sample(self, self.make_key(i, record), [], [annotation], {"id": record.get("id")})


def _trim_turns(turns: list[Said]) -> list[Said]:
    """System turn, if there is one, then questions and answers in turn."""
    system = [turn for turn in turns[:1] if turn[0] == "system"]
    talk = turns[len(system) :]
    while talk and talk[0][0] == "assistant":
        talk = talk[1:]
    if talk and talk[-1][0] == "user":
        talk = talk[:-1]
    if not talk:
        raise BadSample("no question with an answer")
    for number, (role, text, _) in enumerate(talk, len(system)):
        if role != ("user", "assistant")[(number - len(system)) % 2]:
            raise BadSample(f"turn {number} is of {role}; questions and answers must alternate")
        if not text.strip():
            raise BadSample(f"turn {number} is empty")
    return [*system, *talk]
