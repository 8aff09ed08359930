"""A folder of pictures with texts beside them."""

from __future__ import annotations

import json

import pytest

from data_pipelines.build import write_shards
from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.folder import Folder


@pytest.fixture
def put(tmp_path, picture):
    """Writes a file: a picture by its number, anything else as JSON or text."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            path.write_bytes(picture(content, "JPEG" if path.suffix.lower() == ".jpg" else "PNG"))
        else:
            path.write_text(content if path.suffix == ".txt" else json.dumps(content), encoding="utf-8")

    return write


def texts(record):
    return [annotation.turns[-1].text for annotation in record[0].annotations]


def test_texts_stand_beside_pictures(put, tmp_path):
    for number, name in enumerate(("b/2.png", "a.JPG", "b/1.png", "c.png", ".hidden.png", ".cache/x.png")):
        put(name, number)
    put("a.txt", " A cat,\nasleep. \n")
    put("b/1.json", {"text": ["one", "two"], "other": 3})
    put("b/2.json", "only text")
    put("c.json", ["x", " ", "y"])
    first, one, two, last = Folder(folder=str(tmp_path), name="mine", license="CC0")
    assert [record[0].key for record in (first, one, two, last)] == [
        "0000000-a", "0000001-b_1", "0000002-b_2", "0000003-c",
    ]  # fmt: skip
    assert [texts(record) for record in (first, one, two, last)] == [
        ["A cat,\nasleep."], ["one", "two"], ["only text"], ["x", "y"],
    ]  # fmt: skip
    assert [turn.parts for turn in first[0].annotations[0].turns] == [(Media(item=0),), (Text(text="A cat,\nasleep."),)]
    assert first[0].meta == {"images": ["a.JPG"]} and one[0].meta == {"images": ["b/1.png"], "label": "b"}
    assert first[1] == [(tmp_path / "a.JPG").read_bytes()] and first[0].source == "mine"


def test_questions_lines_and_fields_are_options(put, tmp_path):
    put("a.png", 1)
    put("a.txt", "One.\n\nTwo.\n")
    ((sample, _),) = Folder(folder=str(tmp_path), lines=True, question="What is it?")
    assert [[turn.text for turn in annotation.turns] for annotation in sample.annotations] == [
        ["What is it?", "One."],
        ["What is it?", "Two."],
    ]
    (tmp_path / "a.txt").unlink()
    put("a.json", {"caption": "c"})
    assert texts(*Folder(folder=str(tmp_path), text_field="caption")) == ["c"]


def test_sub_folders_are_labels(put, tmp_path):
    for number, name in enumerate(("cats/1.png", "cats/old/2.png", "dogs/1.png", "3.png")):
        put(name, number)
    alone, first, second, third = Folder(folder=str(tmp_path), label="a photo of {label}", limit=4)
    assert str(alone) == "3.png: lies in no sub-folder, whose name is the label"
    assert [texts(one) for one in (first, second, third)] == [["a photo of cats"]] * 2 + [["a photo of dogs"]]
    with pytest.raises(DataError, match="label: got 'cats'; expected a text with {label}"):
        Folder(folder=str(tmp_path), label="cats")


def test_what_cannot_be_used_stands_in_its_place(put, tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        put(name, 1)
    put("a.txt", "good")
    put("b.txt", "  ")
    put("c.json", {"caption": "x"})
    put("d.json", [3])
    (tmp_path / "f.gif").write_bytes(b"GIF89a")
    put("f.txt", "moving")
    put("z.txt", "no picture")
    (tmp_path / "y.png").write_bytes(b"no picture")
    put("y.txt", "text")
    _, *bad = Folder(folder=str(tmp_path))
    assert [str(one) for one in bad[:5]] == [
        "b.png: its text is blank",
        "c.png: its json has no field 'text' (text_field); it has caption",
        "d.png: its json holds 3; expected text",
        "e.png: no e.txt or e.json beside it",
        "f.gif: pictures of this kind are not read, JPEG, PNG, WEBP are; convert it",
    ]
    assert str(bad[5]).startswith("y.png: found bytes of no known format")
    assert str(bad[6]) == "z.txt: no picture z.jpg|jpeg|png|webp beside it"
    assert [one.kind for one in bad] == ["empty", "other", "other", "empty", "image", "image", "other"]


def test_pictures_without_texts_do_not_stop_a_build(put, tmp_path):
    for number in range(3):
        put(f"in/{number}.png", number)
    put("in/0.txt", "text")
    manifest = write_shards(Folder(folder=str(tmp_path / "in")), tmp_path / "out", max_bad=0)
    assert manifest.samples == 1 and sum(manifest.bad.values()) == 2


def test_a_json_of_a_conversation_names_its_source(put, tmp_path):
    put("a.png", 1)
    put("a.json", {"conversations": []})
    (bad,) = Folder(folder=str(tmp_path))
    assert isinstance(bad, BadSample)
    assert str(bad).endswith("it has conversations; source=llava_json reads such records")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.tar", "source=img2dataset reads"),
        ("metadata.jsonl", "source=captions file="),
        ("x.parquet", "source=captions .* source=hf_messages"),
        ("x.txt", "holds no pictures \\(jpg, jpeg, png, webp\\)$"),
    ],
)
def test_folders_of_other_things_say_what_reads_them(put, tmp_path, name, said):
    put(name, "x")
    with pytest.raises(DataError, match=said):
        Folder(folder=str(tmp_path))


def test_no_texts_at_all_is_an_error(put, tmp_path):
    put("cats/1.png", 1)
    put("x.txt", "a readme")
    with pytest.raises(DataError, match='none of the 1 pictures .* label="{label}" takes the names of sub-folders'):
        Folder(folder=str(tmp_path))
    with pytest.raises(DataError, match="folder: no such folder"):
        Folder(folder=str(tmp_path / "none"))
