"""Tars as others leave them: whatever is in one, both commands say the same of it, in words, and write nothing half."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_pipelines.index import main as index
from data_pipelines.indexing import shard_index, shard_lists
from data_pipelines.indexing.shard_lists import index_shards
from data_pipelines.lint import main as lint
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import MANIFEST
from data_pipelines.shards.shard_set import ShardSet


@pytest.fixture
def captions(picture):
    """`captions(key, ...)`: members of captioned pictures."""

    def make(*keys: str) -> list[tuple[str, bytes]]:
        files = ((".jpg", picture(1, "JPEG")), (".txt", b"a caption"))
        return [(f"{key}{name}", data) for key in keys for name, data in files]

    return make


def index_both(tars: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    """Index `tars` with both commands: the keys of the set, and the reasons for what was left out, by shard and key."""
    found = []
    more = [f"{name}={value}" for name, value in options.items()]
    out = tars.with_name("out")
    for arguments in ([f"folder={tars}"], [f"shards={tars}", f"output={out}", "workers=1"]):
        assert index([*arguments, *more]) == 0
        folder = Path(arguments[-2 if len(arguments) > 1 else 0].partition("=")[2])
        shards = ShardSet(folder)
        assert [sample.key for sample, _ in shards] == shards.keys()
        rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert sum(shards.manifest.bad.values()) == len(rows)
        found.append((shards.keys(), {f"{Path(row['shard']).name}:{row['key']}": row["reason"] for row in rows}))
        (tars / MANIFEST).unlink(missing_ok=True)
    (keys, reasons), (also, others) = found
    assert keys == also and reasons.keys() == others.keys()
    return keys, others


def test_both_commands_print_what_was_left_out(tmp_path, tar, captions, capsys):
    tar(tmp_path / "tars" / "0.tar", [*captions("a", "b"), ("c.txt", b"alone")])
    for arguments in ([f"folder={tmp_path / 'tars'}"], [f"shards={tmp_path / 'tars'}", f"output={tmp_path / 'out'}"]):
        assert index(arguments) == 2
        error = capsys.readouterr().err
        assert "1 of 3 samples are unusable, max_bad_share=0.1" in error and "0.tar: sample 'c': " in error
        assert index([*arguments, "max_bad_share=0.4"]) == 0
        assert "2 samples in 1 shards, 10240 bytes, 1 left out (quarantine.jsonl)\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == [
        "0.tar", "index.npz", "manifest.json", "quarantine.jsonl",
    ]  # fmt: skip
    assert lint([f"folder={tmp_path / 'tars'}", "max_problems=0"]) == 0


@pytest.mark.parametrize("names", [["README"], [".hidden.jpg"], ["._a.jpg"], ["d/", "__MACOSX/._a.txt"], [".DS_Store"]])
def test_what_belongs_to_no_sample_is_passed_over(tmp_path, tar, captions, names):
    (tmp_path / "tars").mkdir()
    members = captions("a")
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as file:
        for name, data in (members[0], *((name, b"\0\5\x16\7") for name in names), members[1]):
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, len(data))
            file.addfile(info, io.BytesIO(data))
    assert index_both(tmp_path / "tars") == (["a"], {})


def test_keys_of_any_alphabet_stay_apart(tmp_path, tar, captions):
    tar(tmp_path / "tars" / "0.tar", captions("犬", "猫", "dog (1)", "dog [1]", "in/plain"))
    keys, reasons = index_both(tmp_path / "tars")
    assert len(set(keys)) == 5 and keys[-1] == "in_plain" and not reasons


def test_the_same_key_twice(tmp_path, tar, captions):
    tar(tmp_path / "tars" / "0.tar", captions("a", "b", "a"))
    keys, reasons = index_both(tmp_path / "tars", max_bad_share=0.5)
    assert (keys, list(reasons)) == (["a", "b"], ["0.tar:a"]) and "duplicate key" in reasons["0.tar:a"]


def test_a_key_of_two_shards_is_two_samples_with_one_index_a_shard(tmp_path, tar, captions, capsys):
    for number in range(2):
        tar(tmp_path / "tars" / f"{number}.tar", captions("a"))
    assert index([f"shards={tmp_path / 'tars'}", f"output={tmp_path / 'out'}"]) == 0
    assert (
        ShardSet(tmp_path / "out").keys() == ["a", "a"] and lint([f"folder={tmp_path / 'out'}", "max_problems=0"]) == 0
    )
    assert index([f"folder={tmp_path / 'tars'}"]) == 2
    assert "1.tar: sample 'a': duplicate key, an earlier shard has it; with shards= keys" in capsys.readouterr().err


def test_members_in_another_order_and_dots_in_keys_are_explained(tmp_path, tar, captions):
    tar(tmp_path / "tars" / "0.tar", sorted(captions("a", "b"), key=lambda member: member[0][-3:]))
    tar(tmp_path / "tars" / "1.tar", captions("img.001", "img.002"))
    keys, reasons = index_both(tmp_path / "tars", max_bad_share=1)
    assert keys == [] and len(reasons) == 3
    assert "do not lie one after another" in reasons["0.tar:a"] and "ends at the first dot" in reasons["1.tar:img"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"), (b"just text\n" * 100, "bytes of no known format"), (gzip.compress(bytes(9)), "gzip"),
        (b"BZh9" + bytes(600), "bzip2"), (b"\xfd7zXZ\0" + bytes(600), "xz"), (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
    ids=["empty", "text", "gzip", "bzip2", "xz", "zstd", "lfs"],
)  # fmt: skip
def test_what_is_no_tar_is_named(tmp_path, tar, captions, content, found):
    tar(tmp_path / "tars" / "0.tar", captions("a"))
    (tmp_path / "tars" / "1.tar").write_bytes(content)
    keys, reasons = index_both(tmp_path / "tars", max_bad_share=0.5)
    assert keys == ["a"] and f"not an uncompressed tar, found {found}: " in reasons["1.tar:"]


def test_tars_without_samples_are_sets_without_samples(tmp_path, tar):
    tar(tmp_path / "tars" / "0.tar", [])
    assert index_both(tmp_path / "tars") == ([], {})


def test_folders_without_tars_are_named(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "._0.tar").write_bytes(b"\0\5\x16\7")  # what macOS leaves beside a tar
    for name, message in (("set", "no *.tar files to index"), ("nowhere", "no such ")):
        for arguments in ([f"folder={tmp_path / name}"], [f"shards={tmp_path / name}", f"output={tmp_path / 'out'}"]):
            assert index(arguments) == 2 and message in capsys.readouterr().err
    (tmp_path / "set" / "0.tar.gz").write_bytes(gzip.compress(b"x"))
    assert index([f"folder={tmp_path / 'set'}"]) == 2
    assert "0.tar.gz is compressed, and samples can be found in an unpacked .tar only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["output=x", "layout=img2dataset", "engine=ray", "node=1", "nodes=2"])
def test_options_of_shards_are_refused_with_a_folder(tmp_path, tar, captions, option, capsys):
    tar(tmp_path / "tars" / "0.tar", captions("a"))
    assert index([f"folder={tmp_path / 'tars'}", option]) == 2
    assert f"{option.partition('=')[0]}: of shards= only" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_first(tmp_path, tar, captions, capsys, monkeypatch):
    tar(tmp_path / "tars" / "0.tar", captions("a"))
    monkeypatch.setattr("data_pipelines.index.open_shard", None)  # nothing is read in vain
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert index([f"folder={tmp_path / 'tars'}"]) == 2
    assert f"cannot be written to; shards={tmp_path / 'tars'} output=" in capsys.readouterr().err


def test_a_missing_package_is_no_bad_sample(tmp_path, tar, captions, capsys, monkeypatch):
    tar(tmp_path / "tars" / "0.tar", [*captions(*"abcdefghijk"), ("v.mp4", b"\0\0\0\x18ftypmp42"), ("v.txt", b"x")])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    for arguments in ([f"folder={tmp_path / 'tars'}"], [f"shards={tmp_path / 'tars'}", f"output={tmp_path / 'out'}"]):
        assert index([*arguments, "workers=1"]) == 2 and "videos need PyAV" in capsys.readouterr().err


def test_a_shard_that_grows_meanwhile_is_one_error(tmp_path, tar, captions, monkeypatch):
    tar(tmp_path / "tars" / "0.tar", captions("a"))
    inner = shard_index.index_shard

    def index_shard(job, number):
        record = inner(job, number)
        with open(job.addresses[number], "ab") as file:
            file.write(bytes(512))
        return record

    monkeypatch.setattr(shard_lists, "index_shard", index_shard)
    with pytest.raises(shard_lists.DataError, match=r"0\.tar: it, or its index, has changed since it was indexed"):
        index_shards(str(tmp_path / "tars"), tmp_path / "out", Layout(), workers=1)
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.undo()
    assert index_shards(str(tmp_path / "tars"), tmp_path / "out", Layout(), workers=1) is not None
