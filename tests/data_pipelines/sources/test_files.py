"""What sources read from disk."""

from __future__ import annotations

import os
import pickle

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources import files
from data_pipelines.sources.files import ImageFolder, JsonLines, find_files, needs, read_json, read_records, read_yaml


def test_image_folder_reads_files_below_it_only(tmp_path, picture):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").write_bytes(picture(1))
    (tmp_path / "out.png").write_bytes(picture(2))
    os.mkfifo(tmp_path / "in" / "pipe")
    folder = ImageFolder(str(tmp_path / "in"))
    assert folder.read("a/1.png") == picture(1)
    for path, reason in {
        "../out.png": "leaves the image folder",
        str(tmp_path / "out.png"): "leaves the image folder",
        "a/2.png": "No such file",
        "a": "is not a file",
        "pipe": "is not a file",
    }.items():
        with pytest.raises(BadSample, match=reason):
            folder.read(path)
    with pytest.raises(BadSample, match=r"names image 'x', but no folder was given \(images=<folder>\)"):
        ImageFolder(None).read("x")
    with pytest.raises(DataError, match="images: no such folder"):
        ImageFolder(str(tmp_path / "none"))


def test_large_images_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(bytes(11))
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(BadSample, match="has 11 bytes; at most 10"):
        ImageFolder(str(tmp_path)).read("x.png")


def test_json_lines_have_places_numbers_and_a_bound(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes('{"a": "é"}\n\n  \r\n[1]\r\n{broken\n"0123456789"\n2'.encode())
    monkeypatch.setattr(files, "_PIECE", 4)
    monkeypatch.setattr(files, "MAX_LINE", 12)
    lines = pickle.loads(pickle.dumps(JsonLines(tmp_path / "x.jsonl")))
    assert [lines.line(i) for i in range(len(lines))] == [1, 4, 5, 6, 7]
    assert (lines[0], lines[1], lines[4], lines[-1]) == ({"a": "é"}, [1], 2, 2)
    with pytest.raises(BadSample, match="not JSON: Expecting property name"):
        lines[2]
    with pytest.raises(BadSample, match="line of 13 bytes; at most 12"):
        lines[3]
    with pytest.raises(IndexError):
        lines[5]


def test_records_are_a_list_or_lines(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')  # a byte order mark, as some editors write it
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    assert list(read_records(tmp_path / "x.json")) == list(read_records(tmp_path / "x.jsonl")) == [{"a": 1}]
    for text, reason in {
        "{}": "holds a dict; expected a list",
        "[" * 100_000: "is not JSON",
        "[": "is not JSON",
    }.items():
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            read_records(tmp_path / "x.json")
    for read in (read_json, read_yaml, JsonLines):
        with pytest.raises(DataError, match="file: .*none: No such file"):
            read(tmp_path / "none")


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(DataError, match="is not YAML"):
        read_yaml(tmp_path / "x.yaml")
    assert not (tmp_path / "made").exists()


def test_files_are_found_in_order(tmp_path):
    for name in ("2.tar", "1.tar", "3.txt"):
        (tmp_path / name).touch()
    (tmp_path / "0.tar").mkdir()
    assert [path.name for path in find_files(tmp_path, ".tar")] == ["1.tar", "2.tar"]
    with pytest.raises(DataError, match="holds no .parquet files"):
        find_files(tmp_path, ".parquet")
    with pytest.raises(DataError, match="no such folder"):
        find_files(tmp_path / "none", ".tar")


def test_missing_packages_are_named():
    with pytest.raises(DataError, match=r"no_such is not installed: pip install 'vlm-train\[data\]'"):
        needs("no_such")
