"""Messages: one JSON object a line."""

from __future__ import annotations

import base64
import json

import pytest

from data_pipelines.build import write_shards
from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.sources.messages import Messages
from tests.support.videos import video


def _talk(*values):
    return [{"role": ("user", "assistant")[n % 2], "content": value} for n, value in enumerate(values)]


def _uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def read(tmp_path, picture):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))

    def make(*records):
        text = "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
        (tmp_path / "x.jsonl").write_text(text)
        return list(Messages(file=str(tmp_path / "x.jsonl"), media=str(tmp_path), name="mine", license="CC0"))

    return make


def _parts(record, turn=0, annotation=0):
    return record[0].annotations[annotation].turns[turn].parts


def test_tags_mark_the_places_of_images(read, picture):
    record = {"id": "x", "images": ["1.png", _uri(picture(2))], "messages": _talk("A:\n<image>\nB:<image>?", "<image>")}
    ((sample, blobs),) = read(record)
    user, assistant = sample.annotations[0].turns
    assert user.parts == (Text(text="A:"), Media(item=0), Text(text="B:"), Media(item=1), Text(text="?"))
    assert assistant.parts == (Text(text="<image>"),)  # in an answer it is text
    assert blobs == [picture(1), picture(2)] and [item.name for item in sample.media] == ["0.png", "1.png"]
    assert (sample.key, sample.source, sample.license) == ("0000000-x", "mine", "CC0")


def test_paths_start_from_the_file_s_own_folder(read, tmp_path):
    expected = read({"images": ["1.png"], "messages": _talk("<image>", "y")})
    assert list(Messages(file=str(tmp_path / "x.jsonl"), name="mine", license="CC0")) == expected
    (tmp_path / "x.json").write_text(f"[{(tmp_path / 'x.jsonl').read_text()}]")
    assert list(Messages(file=str(tmp_path / "x.json"), name="mine", license="CC0")) == expected
    with pytest.raises(DataError, match="file: .*nowhere/x.jsonl: No such file"):
        Messages(file=str(tmp_path / "nowhere" / "x.jsonl"))
    (tmp_path / "none").mkdir()
    (error,) = Messages(file=str(tmp_path / "x.jsonl"), media=str(tmp_path / "none"))
    assert "none/1.png: No such file" in str(error)


def test_unmarked_images_come_first(read):
    first, second = read(
        {"images": ["1.png", "2.png"], "messages": [{"role": "system", "content": "Be kind."}, *_talk("Hm?", "y")]},
        {"image": "1.png", "messages": _talk("What?", "y")},
    )
    assert _parts(first, 0) == (Text(text="Be kind."),)
    assert _parts(first, 1) == (Media(item=0), Media(item=1), Text(text="Hm?"))
    assert _parts(second) == (Media(item=0), Text(text="What?")) and second[0].key == "0000001"


def test_content_as_parts(read, picture):
    ask = [
        {"type": "image"},
        {"type": "text", "text": "<image> or"},
        {"type": "image_url", "image_url": {"url": _uri(picture(2))}},
        {"type": "image", "image": "2.png"},
        {"type": "image", "image": "2.png"},
    ]
    (record,) = read({"images": ["1.png"], "messages": _talk(ask, [{"type": "text", "text": "y"}])})
    assert [part.item if isinstance(part, Media) else part.text for part in _parts(record)] == [
        0, "<image> or", 1, 2, 2,
    ]  # fmt: skip
    assert record[1] == [picture(1), picture(2), picture(2)] and _parts(record, 1) == (Text(text="y"),)


def test_parts_may_name_the_number_of_their_image(read):
    ask = [{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0, "text": None}]
    (record, bad) = read(
        {"images": ["1.png", "2.png"], "messages": _talk(ask, "y")},
        {"images": ["1.png"], "messages": _talk(ask, "y")},
    )
    assert _parts(record) == (Media(item=1), Media(item=0))
    assert "marks image 1 of the 1 it lists" in str(bad)


def test_videos_stand_beside_images(read, picture, tmp_path):
    clip = video(frames=4)
    (tmp_path / "1.mp4").write_bytes(clip)
    tagged, unmarked, parts = read(
        {"images": ["1.png"], "videos": ["1.mp4"], "messages": _talk("<video>How?<image>", "<video>")},
        {"images": ["1.png"], "videos": ["1.mp4"], "messages": _talk("How?", "y")},
        {
            "images": ["1.png"],
            "videos": ["1.mp4"],
            "messages": _talk([{"type": "video"}, {"type": "image"}, {"type": "video", "video": "1.mp4"}], "y"),
        },
    )
    assert [item.kind for item in tagged[0].media] == ["image", "video"] and tagged[1] == [picture(1), clip]
    assert _parts(tagged) == (Media(item=1), Text(text="How?"), Media(item=0))
    assert _parts(tagged, 1) == (Text(text="<video>"),)
    assert _parts(unmarked) == (Media(item=0), Media(item=1), Text(text="How?"))
    assert _parts(parts) == (Media(item=1), Media(item=0), Media(item=2)) and parts[1] == [picture(1), clip, clip]


def test_several_conversations_about_the_same_images(read):
    several = [_talk("One?", "1"), _talk("<image>Two?", "2", "Three?", "3")]
    (record,) = read({"images": ["1.png"], "messages": several})
    assert [len(annotation.turns) for annotation in record[0].annotations] == [2, 4] and len(record[1]) == 1
    assert _parts(record, annotation=0) == (Media(item=0), Text(text="One?"))
    assert _parts(record, annotation=1) == (Media(item=0), Text(text="Two?"))


@pytest.mark.parametrize("rejected", ["no", {"role": "assistant", "content": "no"}, _talk("", "no")[1:]])
def test_rejected_answers(read, rejected):
    record = {"messages": _talk("Is it?", "yes")}
    ((sample, _), (swift, _)) = read({**record, "rejected": rejected}, {**record, "rejected_response": rejected})
    (annotation,) = sample.annotations
    assert swift.annotations == sample.annotations
    assert [turn.text for turn in annotation.turns] == ["Is it?", "yes"]
    assert (annotation.rejected.role, annotation.rejected.text) == ("assistant", "no")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{broken", "line 2: not JSON"),
        ("[]", "line 2: holds a list, not an object"),
        ({"text": "x", "id": 1}, "record 1: has no list of messages; its fields: text, id"),
        ({"id": 9, "messages": []}, "record 9: its last turn is not an answer"),
        ({"messages": _talk("Hi")}, "its last turn is not an answer"),
        ({"messages": _talk("Hi", " ")}, "its last turn is not an answer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn of 'tool'; allowed: human, user, gpt, assistant"),
        ({"messages": _talk("<image>", "y")}, "marks more images than the 0 it lists"),
        ({"images": ["1.png", "2.png"], "messages": _talk("<image>", "y")}, "marks 1 of the 2 images it lists"),
        (
            {"images": ["1.png"], "messages": _talk("What?", "<image> A cat.")},
            "marks 0 of the 1 images it lists; turn 2, of the assistant, has <image>, which marks images in user turns",
        ),
        (
            {"images": ["1.png", "2.png"], "messages": _talk("<image>", "y", "And?", "<image> no")},
            "marks 1 of the 2 images it lists; turn 4, of the assistant, has <image>",
        ),
        ({"images": ["../x"], "messages": _talk("<image>", "y")}, "leaves the folder"),
        ({"images": ["data:image/png,x"], "messages": _talk("<image>", "y")}, "is not data:<type>;base64"),
        ({"images": ["data:image/png;base64,!"], "messages": _talk("<image>", "y")}, "non-alphabet|Only base64"),
        ({"images": [7], "messages": _talk("<image>", "y")}, "of type int; allowed: a path"),
        ({"messages": _talk([{"type": "audio"}], "y")}, "part of type 'audio'; allowed: text, image, image_url, video"),
        ({"messages": _talk([{"type": "video"}], "y")}, "marks more videos than the 0 it lists"),
        ({"videos": ["1.png", "2.png"], "messages": _talk("<video>", "y")}, "marks 1 of the 2 videos it lists"),
        ({"messages": _talk("Hi", "yes"), "rejected": _talk("Hi", "no")}, "an answer of 2 messages; expected one"),
        ({"messages": _talk("Hi", "yes"), "rejected": ""}, "the rejected turn is not an answer"),
        ({"messages": [_talk("Hi", "yes")], "rejected": "no"}, "several conversations and one rejected answer"),
    ],
)
def test_unusable_lines_stand_in_their_place(read, record, reason):
    good, bad, last = read({"messages": _talk("Hi", "Hello")}, record, {"messages": _talk("Hi", "Hello")})
    assert isinstance(bad, BadSample) and good[0].key == "0000000" and last[0].key == "0000002"
    with pytest.raises(BadSample, match=reason):
        raise bad


def test_shards_hold_what_was_read(read, tmp_path):
    (record,) = read({"images": ["1.png"], "messages": _talk("What?", "yes"), "rejected": "no"})
    write_shards(Messages(file=str(tmp_path / "x.jsonl"), media=str(tmp_path)), tmp_path / "out")
    sample, blobs = ShardSet(tmp_path / "out").load_sample(0)
    assert (sample.annotations, blobs) == (record[0].annotations, record[1])


@pytest.mark.parametrize(
    ("field", "weight"),
    [
        ({"loss": False}, 0.0),
        ({"weight": 0}, 0.0),
        ({"loss_weight": 0.25}, 0.25),
        ({"train": True}, 1.0),
        ({"loss": None}, 1.0),
    ],
)
def test_what_is_not_learned_elsewhere_is_not_learned_here(read, field, weight):
    first, second = _talk("q", "a"), _talk("r", "b")
    ((sample, _),) = read({"messages": [first[0], first[1] | field, *second]})
    assert [turn.weight for turn in sample.annotations[0].turns] == [1.0, weight, 1.0, 1.0]


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"content": 3}, "content of type int; allowed: text, or a list of parts"),
        ({"content": {"type": "text", "text": "q"}}, "content of type dict; allowed"),
        ({"content": ["q"]}, "a part of type str; allowed: an object with type"),
        ({"role": ["user"]}, "turn of ['user']; allowed: "),
    ],
)
def test_turns_of_another_shape_are_named(read, field, reason):
    talk = _talk("q", "a")
    talk[0] |= field
    (bad,) = read({"messages": talk})
    assert isinstance(bad, BadSample) and reason in str(bad)


@pytest.mark.parametrize(
    ("turn", "field", "reason"),
    [
        (1, {"weight": "0"}, "weight '0'; allowed: true, false, or a number from 0"),
        (1, {"loss_weight": -1}, "loss_weight -1; allowed"),
        (1, {"loss_weight": float("nan")}, "loss_weight nan; allowed"),
        (1, {"weight": 1, "train": False}, "contradict each other"),
        (1, {"train_detail": [{"begin_offset": 0}]}, "train_detail, which is not read"),
        (0, {"train": True}, "only turns of the assistant are learned"),
    ],
)
def test_what_changes_the_learned_is_never_dropped(read, turn, field, reason):
    talk = _talk("q", "a")
    talk[turn] |= field
    (bad,) = read({"messages": talk})
    assert isinstance(bad, BadSample) and reason in str(bad)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_beside_the_messages_is_the_system_turn(read, name):
    for record in ({"messages": _talk("q", "a")}, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        ((sample, _),) = read(record | {name: "Answer in French."})
        turns = sample.annotations[0].turns
        assert [turn.role for turn in turns] == ["system", "user", "assistant"]
        assert turns[0].text == "Answer in French."
    ((same, _),) = read({name: "x", "messages": [{"role": "system", "content": "x"}, *_talk("q", "a")]})
    assert len(same.annotations[0].turns) == 3
    (bad,) = read({name: "y", "messages": [{"role": "system", "content": "x"}, *_talk("q", "a")]})
    assert isinstance(bad, BadSample) and "another text as system" in str(bad)


@pytest.mark.parametrize("spell", ["path", "object", "url", "file", "base64", "bare"])
def test_spellings_of_an_image(read, tmp_path, picture, spell):
    whole = str(tmp_path / "1.png")
    part = {"path": {"path": "1.png"}, "url": {"url": "1.png"}, "file": {"image": f"file://{whole}"},
            "base64": {"base64": base64.b64encode(picture(1)).decode()}}  # fmt: skip
    record: dict = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *_talk("q", "a")[1:]]}
    if spell in part:
        record["messages"][0]["content"].append({"type": "image", **part[spell]})
    else:
        record["images"] = [{"path": "1.png"} if spell == "object" else "1.png"]
    ((_, blobs),) = read(record)
    assert blobs == [picture(1)]


def test_what_is_no_image_is_named(read):
    asked = lambda part: {"messages": [{"role": "user", "content": [part]}, *_talk("q", "a")[1:]]}  # noqa: E731
    records = [
        asked({"type": "text", "text": None}),
        asked({"type": "image", "url": "https://example.org/a.png"}),
        {"images": ["1.png", None], "messages": _talk("<image><image>q", "a")},
        {"images": [5], "messages": _talk("<image>q", "a")},
    ]
    reasons = [str(record) for record in read(*records)]
    assert "a part of type 'text' holds None, not text" in reasons[0]
    assert "'https://example.org/a.png' is an address, and nothing is downloaded" in reasons[1]
    assert "image 1 of its 2 images is null" in reasons[2] and "of type int; allowed: a path" in reasons[3]


def test_whole_paths_into_a_folder_given_relatively(tmp_path, picture, monkeypatch):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    lines = [{"images": [str(tmp_path / name)], "messages": _talk("<image>q", "a")} for name in ("img/a.png", "b.png")]
    (tmp_path / "img" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder, file, media in ((tmp_path / "img", "x.jsonl", None), (tmp_path, "img/x.jsonl", "img")):
        monkeypatch.chdir(folder)
        (_, blobs), bad = list(Messages(file=file, media=media))
        assert blobs == [picture(1)]
        assert f"path '{tmp_path / 'b.png'}' leaves the folder" in str(bad)
