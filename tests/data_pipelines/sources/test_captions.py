"""Pictures and texts in one table."""

from __future__ import annotations

import base64
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.build import main, write_shards
from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.shards.manifest import Manifest
from data_pipelines.sources.captions import Captions

NAN = float("nan")


@pytest.fixture
def folder(tmp_path, picture):
    for number in (1, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def write(folder, rows, kind):
    """The path of a table of `rows`, dictionaries of the same fields."""
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(mark.join("" if one is None else str(one) for one in line) + "\n" for line in lines))
    return str(path)


def pairs(record):
    """Question and answer of every annotation."""
    return [tuple(turn.text for turn in annotation.turns) for annotation in record[0].annotations]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_samples(folder, picture, kind):
    rows = [
        {"image": "1.png", "text": " a cat "},
        {"image": "2.png", "text": "a dog"},
        {"image": "1.png", "text": "the cat"},
    ]
    first, second = pickle.loads(pickle.dumps(Captions(file=write(folder, rows, kind), name="mine", license="CC0")))
    assert (first[0].key, first[0].source, first[0].license, first[0].meta) == (
        "0000000-1", "mine", "CC0", {"images": ["1.png"]},
    )  # fmt: skip
    assert (first[1], second[1]) == ([picture(1)], [picture(2)]) and second[0].key == "0000001-2"
    assert [[turn.parts for turn in annotation.turns] for annotation in first[0].annotations] == [
        [(Media(item=0),), (Text(text="a cat"),)],
        [(Media(item=0),), (Text(text="the cat"),)],
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_and_questions_are_options(folder, kind):
    rows = [
        {"file_name": "1.png", "q": "what?", "a": "cat"},
        {"file_name": "2.png", "q": "what?", "a": "dog"},
        {"file_name": "1.png", "q": "where?", "a": "sofa"},
    ]
    names = {"image_column": "file_name", "text_column": "a"}
    first, second = Captions(file=write(folder, rows, kind), **names, question_column="q")
    assert pairs(first) == [("what?", "cat"), ("where?", "sofa")] and pairs(second) == [("what?", "dog")]
    first, _ = Captions(file=write(folder, rows, kind), **names, question="What is it?")
    assert pairs(first) == [("What is it?", "cat"), ("What is it?", "sofa")]
    with pytest.raises(DataError, match="question='x' and question_column=q: give one"):
        Captions(file=write(folder, rows, kind), **names, question="x", question_column="q")


def test_images_lie_in_the_folder_of_the_table_or_another(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    file = write(tmp_path / "lists", [{"image": "1.png", "text": "a"}], "csv")
    (error,) = Captions(file=file)
    assert isinstance(error, BadSample) and "lists/1.png: No such file" in str(error)
    ((sample, _),) = Captions(file=file, images=str(folder))
    assert sample.key == "0000000-1"


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_may_hold_the_bytes(folder, picture, as_struct):
    images = [{"bytes": picture(n), "path": f"{n}.png"} if as_struct else picture(n) for n in (1, 2)]
    rows = [{"image": image, "text": ["a", "b"]} for image in images]
    first, second = Captions(file=write(folder, rows, "parquet"))
    assert first[1] == [picture(1)] and second[1] == [picture(2)] and pairs(first) == [("", "a"), ("", "b")]
    assert first[0].key == ("0000000-1" if as_struct else "0000000")


def test_a_data_uri_is_an_image(folder, picture):
    uri = "data:image/png;base64," + base64.b64encode(picture(5)).decode()
    ((sample, blobs),) = Captions(file=write(folder, [{"image": uri, "text": 7, "id": "x"}], "jsonl"))
    assert blobs == [picture(5)] and sample.annotations[0].turns[1].text == "7"
    assert sample.key == "0000000-x" and sample.meta == {"id": "x"}


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("jsonl", [None, NAN, "", "  ", []]),
        ("parquet", [None, "", " "]),
        ("csv", [None, "", "nan", "NaN", "null", "None"]),
    ],
)
def test_missing_texts_are_left_out_and_counted(folder, kind, missing):
    rows = [{"image": "2.png", "text": text} for text in missing]
    file = write(folder, [{"image": "1.png", "text": "a"}, *rows, {"image": "2.png", "text": "b"}], kind)
    manifest = write_shards(Captions(file=file), folder / "out", max_bad=0)
    assert manifest.samples == 2 and sum(manifest.bad.values()) == len(missing)
    assert all("text is missing" in reason for reason in manifest.bad)
    assert len((folder / "out" / "quarantine.jsonl").read_text().splitlines()) == len(missing)


def test_none_is_a_text_of_json_and_lower_case_none_of_csv(folder):
    assert pairs(*Captions(file=write(folder, [{"image": "1.png", "text": "nan"}], "jsonl"))) == [("", "nan")]
    assert pairs(*Captions(file=write(folder, [{"image": "1.png", "text": "none"}], "csv"))) == [("", "none")]


def test_only_missing_texts_is_an_error_that_says_so(folder):
    file = write(folder, [{"image": "1.png", "text": ""}], "csv")
    with pytest.raises(DataError, match=r"1 bad records among 1, the source gave no usable sample"):
        write_shards(Captions(file=file), folder / "out")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "9.png", "text": "a"}, "line 2: .*9.png: No such file"),
        ({"image": "../1.png", "text": "a"}, "line 2: path '../1.png' leaves the folder"),
        ({"image": "https://x.org/1.png", "text": "a"}, "line 2: image is the address 'https://x.org/1.png'; download"),
        ({"image": None, "text": "a"}, "line 2: image is None; expected a path, a data URI or bytes"),
        ({"image": "1.png", "text": 0.5}, "line 2: text is 0.5; expected text"),
        ({"image": "1.png", "text": True}, "line 2: text is True; expected text"),
        ({"image": "table.jsonl", "text": "a"}, "line 2: found bytes of no known format"),
        ({"image": "1.png", "messages": []}, "line 2: has no text; source=messages reads such records"),
        ({"image": "1.png", "conversations": []}, "line 2: has no text; source=llava_json reads such records"),
    ],
)
def test_unusable_rows_stand_in_their_place(folder, row, reason):
    good, bad, last = Captions(
        file=write(folder, [{"image": "3.png", "text": "a"}, row, {"image": "2.png", "text": "b"}], "jsonl")
    )
    assert good[0].key == "0000000-3" and last[0].key.endswith("-2") and isinstance(bad, BadSample)
    with pytest.raises(BadSample, match=reason):
        raise bad


def test_a_comma_without_quotes_is_no_shorter_caption(folder):
    (folder / "table.csv").write_text("image,text\n1.png,a cat, asleep\n2.png,a dog\n")
    bad, good = Captions(file=str(folder / "table.csv"))
    assert str(bad) == "line 2: has 3 values, the header names 2; are its texts in quotes?"
    assert pairs(good) == [("", "a dog")]


@pytest.mark.parametrize(
    ("rows", "kind", "options", "reason"),
    [
        ([{"image": "1.png", "caption": "a"}], "csv", {}, "text_column=text: .* no such column; it has image, caption"),
        ([{"image": "1.png", "caption": "a"}], "csv", {}, "; source=captions text_column=caption reads such records"),
        ([{"path": "1.png", "title": "a"}], "parquet", {}, "source=captions image_column=path text_column=title reads"),
        ([{"image": "", "question": "", "answer": ""}], "jsonl", {}, "text_column=answer question_column=quest"),
        ([{"image": "1.png", "conversations": []}], "json", {}, "text_column=text: .*; source=llava_json reads"),
        ([{"messages": [], "images": []}], "jsonl", {}, "source=messages reads"),
        ([{"instruction": "a", "input": "", "output": "c"}], "json", {}, "source=alpaca reads"),
        ([{"video": "1.mp4", "caption": "c"}], "csv", {}, "source=video_folder reads"),
        ([{"image;text": "1.png;a"}], "csv", {}, "it has image;text; its columns seem to be separated by ';'"),
        ([{"image": "1.png", "text": "a"}], "csv", {"question_column": "q"}, "question_column=q: .*it has image, text"),
        ([], "jsonl", {}, "holds no rows"),
    ],
)  # fmt: skip
def test_tables_of_other_columns_say_what_reads_them(folder, rows, kind, options, reason):
    with pytest.raises(DataError, match=reason):
        Captions(file=write(folder, rows, kind), **options)


def test_limit_takes_the_first_rows(folder):
    rows = [{"image": "1.png", "text": "a"}, {"image": "2.png", "text": "b"}, {"image": "1.png", "text": "c"}]
    first, second = Captions(file=write(folder, rows, "csv"), limit=2)
    assert pairs(first) == [("", "a")] and pairs(second) == [("", "b")]


def test_the_command_prints_what_is_left_out(folder, capsys):
    file = write(folder, [{"image": "1.png", "text": "a"}, {"image": "2.png", "text": None}], "csv")
    assert main(["source=captions", f"file={file}", f"output={folder}/out", "workers=1"]) == 0
    said = capsys.readouterr().out
    assert f"1 records left out, see {folder}/out/quarantine.jsonl:\n         1  text is missing: …" in said
    assert Manifest.read(folder / "out").samples == 1
