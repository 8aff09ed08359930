"""What sources read from disk."""

from __future__ import annotations

import os

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs import files
from data_pipelines.inputs.files import MediaFolder, find_files, read_json, read_list, read_yaml, require_module


def test_media_folder_reads_files_below_it_only(tmp_path, picture):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").write_bytes(picture(1))
    (tmp_path / "out.png").write_bytes(picture(2))
    os.mkfifo(tmp_path / "in" / "pipe")
    folder = MediaFolder(tmp_path / "in", "images")
    assert folder.read("a/1.png") == folder.read(str(tmp_path / "in" / "a" / "1.png")) == picture(1)
    assert folder.read("a/0.png", "a/1.png") == picture(1)
    for names, reason in {
        ("../out.png",): "leaves the folder",
        (str(tmp_path / "out.png"),): "leaves the folder",
        ("a/1.png", "../out.png"): "leaves the folder",
        ("a/2.png", "a/3.png"): "a/2.png: No such file",
        ("a",): "is not a file",
        ("pipe",): "is not a file",
        ("a\0b",): "null",
        ("a" * 999,): "File name too long",
    }.items():
        with pytest.raises(BadSample, match=reason):
            folder.read(*names)
    with pytest.raises(BadSample, match=r"names 'x', but no folder was given \(videos=<folder>\)"):
        MediaFolder(None, "videos").read("x")
    with pytest.raises(DataError, match="images: no such folder"):
        MediaFolder(tmp_path / "none")


def test_large_files_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(bytes(11))
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(BadSample, match="has 11 bytes; at most 10"):
        MediaFolder(tmp_path).read("x.png")


def test_files_that_do_not_parse_are_named_with_their_option(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')  # a byte order mark, as some editors write it
    assert read_json(tmp_path / "x.json") == {"a": [1]} and read_list(tmp_path / "x.json", "file", "a") == [1]
    with pytest.raises(DataError, match="ocr: .*x.json holds a NoneType; expected a list under 'b'"):
        read_list(tmp_path / "x.json", "ocr", "b")
    for text in ("[" * 100_000, "["):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match="ocr: .*x.json is not JSON"):
            read_json(tmp_path / "x.json", "ocr")
    for read in (read_json, read_yaml):
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
    assert [path.name for path in find_files(tmp_path, ".txt", "2.tar")] == ["2.tar", "3.txt"]
    with pytest.raises(DataError, match="holds no .parquet or .jsonl.zip files"):
        find_files(tmp_path, ".parquet", ".jsonl.zip")
    with pytest.raises(DataError, match="no such folder"):
        find_files(tmp_path / "none", ".tar")


def test_missing_packages_are_named():
    with pytest.raises(DataError, match=r"no_such is not installed: pip install 'vlm-train\[data\]'"):
        require_module("no_such.part")
