"""Shards that others wrote, read at random without a copy: any layout, any address, killed and continued, with what is
unusable left out and named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from zipfile import ZipFile

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import main as index
from data_pipelines.indexing import shard_index, shard_lists
from data_pipelines.indexing.addresses import expand_addresses
from data_pipelines.indexing.shard_lists import index_shards
from data_pipelines.shards.columns import Columns, ColumnWriter
from data_pipelines.shards.index_parts import MAX_OPEN_PARTS, IndexParts
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.shard_set import ShardSet
from tests.data_pipelines.shards.test_remote import Server


@pytest.fixture
def web(tmp_path, tar, picture):
    """`web(shards, samples)`: img2dataset's tars, `tars/00000.tar` and so on, with a member that nothing reads."""

    def make(shards: int = 3, samples: int = 4) -> Path:
        for number in range(shards):
            members = []
            for i in range(samples):
                key, about = (
                    f"{number:05d}{i:04d}",
                    {"url": f"u{i}", "caption": f"{number}-{i} in json", "tags": ["a", "b"]},
                )
                members += [
                    (f"{key}.jpg", picture(i, "JPEG", (20 + i, 10))),
                    (f"{key}.json", json.dumps(about).encode()),
                ]
                members += [(f"{key}.txt", f"{number}-{i}".encode()), (f"{key}.pickle", b"never read")]
            tar(tmp_path / "tars" / f"{number:05d}.tar", members)
        return tmp_path / "tars"

    return make


def texts(shards: ShardSet) -> list[str]:
    return [annotation.turns[1].text for sample, _ in shards for annotation in sample.annotations]


ALL = [f"{shard}-{i}" for shard in range(3) for i in range(4)]


@pytest.mark.parametrize("workers", [1, 2])
def test_others_shards_are_read_where_they_are(tmp_path, web, capsys, workers):
    tars, out = web(), tmp_path / "set"
    arguments = [f"shards='{tars}/{{00000..00002}}.tar'", f"output={out}", "layout=img2dataset", f"workers={workers}"]
    assert index(arguments) == 0 and "12 samples in 3 shards" in capsys.readouterr().out
    shards = ShardSet(out)
    assert texts(shards) == ALL and len(shards) == 12 and not list(out.rglob("*.tar"))
    sample, (blob,) = shards.load_sample(6)
    assert (sample.key, sample.meta, sample.media[0].width) == ("000010002", {"url": "u2"}, 22)
    assert shards.shard_path(6) == str(tars / "00001.tar") and blob[:2] == b"\xff\xd8"
    assert [item.width for item in shards.media_items(6)] == [22] and shards.count_media(6) == 1
    assert shards.shard_starts.tolist() == shards.find_runs().tolist() == [0, 4, 8]
    assert shards.index.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (
        shards.keys() == [shards.key(i) for i in range(12)] == [f"{s:05d}{i:04d}" for s in range(3) for i in range(4)]
    )
    again = pickle.loads(pickle.dumps(shards))
    assert texts(again) == ALL and again.fingerprint == shards.fingerprint
    assert shards.count_annotations(0) == 1 and shards.read_sample(5).annotations == sample_of(shards, 5).annotations
    with pytest.raises(IndexError, match="sample 12 of 12"):
        shards.load_sample(12)
    assert index(arguments) == 0 and "force=true" in capsys.readouterr().out


def sample_of(shards: ShardSet, i: int):
    return shards.load_sample(i)[0]


def test_the_index_of_a_shard_is_the_same_whoever_writes_it(tmp_path, web):
    tars, layout = str(web()), Layout()
    index_shards(tars, tmp_path / "alone", layout, workers=1)
    index_shards(tars, tmp_path / "spread", layout, workers=2)
    for node in (1, 0):
        assert index_shards(tars, tmp_path / "nodes", layout, workers=1, node=node, nodes=2) is None
        assert not (tmp_path / "nodes" / "manifest.json").exists()
    index_shards(tars, tmp_path / "nodes", layout, workers=1)
    found = [
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "alone", tmp_path / "spread", tmp_path / "nodes")
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 3 * 2 + 3


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, web, monkeypatch):
    tars, out = str(web()), tmp_path / "set"
    read: list[int] = []
    inner = shard_index.read_shard

    def read_shard(job, number, fetched):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(number)
        return inner(job, number, fetched)

    monkeypatch.setattr(shard_index, "read_shard", read_shard)
    with pytest.raises(KeyboardInterrupt):
        index_shards(tars, out, Layout(), workers=1)
    assert read == [0, 1] and not (out / "manifest.json").exists()
    monkeypatch.setattr(shard_index, "read_shard", lambda *job: read.append(job[1]) or inner(*job))
    index_shards(tars, out, Layout(), workers=1)
    assert read == [0, 1, 2] and texts(ShardSet(out)) == ALL
    index_shards(tars, out, Layout(text="json.caption"), workers=1)  # another layout: all again
    assert read == [0, 1, 2, 0, 1, 2]
    (out / "index" / "000001.npz").write_bytes(b"cut")
    index_shards(tars, out, Layout(text="json.caption"), workers=1)
    assert read[6:] == [1] and texts(ShardSet(out))[0] == "0-0 in json"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"text": "json.caption"}, ["0-0 in json"]),
        ({"text": "json.tags"}, ["a", "b"]),
        ({"text": "txt", "media": ["jpg"]}, ["0-0"]),
        ({"text": "txt", "media": ["jpeg", "jpg"], "meta": ["tags"]}, ["0-0"]),
    ],
)
def test_a_layout_says_which_member_is_what(tmp_path, web, options, expected):
    web(1, 1)
    layout = " ".join(f"layout.{name}={value}".replace("'", "").replace(" ", "") for name, value in options.items())
    assert index([f"shards={tmp_path / 'tars'}", f"output={tmp_path / 'set'}", *layout.split()]) == 0
    shards = ShardSet(tmp_path / "set")
    assert texts(shards) == expected
    assert sample_of(shards, 0).meta == ({"tags": ["a", "b"]} if "meta" in options else {})


def test_media_come_in_the_order_of_the_layout(tmp_path, tar, picture):
    members = [("a.before.png", picture(1, size=(3, 3))), ("a.after.png", picture(2, size=(5, 5))), ("a.txt", b"x")]
    tar(tmp_path / "0.tar", members)
    for media, widths in (([], [3, 5]), (["after.png", "before.png"], [5, 3]), (["after.png"], [5]), (["png"], [3, 5])):
        out = tmp_path / f"set-{'-'.join(media)}"
        index_shards(str(tmp_path / "0.tar"), out, Layout(media=tuple(media)), workers=1)
        assert [item.width for item in sample_of(ShardSet(out), 0).media] == widths


def test_unusable_samples_are_left_out_and_named(tmp_path, web, tar, picture, capsys):
    tars = web()
    members = [("good.jpg", picture(1, "JPEG")), ("good.txt", b"ok")]
    members += [("nojpg.txt", b"x"), ("broken.jpg", b"no image"), ("broken.txt", b"x")]
    members += [("empty.jpg", picture(2, "JPEG")), ("empty.txt", b"  "), ("notext.jpg", picture(3, "JPEG"))]
    members += [("twice.txt", b"x"), ("twice.txt", b"y"), ("latin.jpg", picture(4, "JPEG")), ("latin.txt", b"\xff")]
    members += [("good.jpg", picture(1, "JPEG")), ("good.txt", b"again")]
    tar(tars / "00003.tar", members)
    whole = (tars / "00002.tar").read_bytes()
    (tars / "00002.tar").write_bytes(whole[: len(whole) // 2])
    (tars / "00004.tar").write_bytes(b"\x1f\x8b no tar")
    out = tmp_path / "set"
    arguments = [f"shards={tars}", f"output={out}", "workers=1"]
    assert index(arguments) == 2  # more than a tenth
    error = capsys.readouterr().err
    assert "samples are unusable, max_bad_share=0.1; is the layout another?" in error and "Traceback" not in error
    assert index([*arguments, "max_bad_share=0.5"]) == 0
    said = capsys.readouterr().out
    assert "5 of 5 shards were indexed before" in said and "left out (quarantine.jsonl)" in said
    shards, rows = ShardSet(out), [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [text for text in texts(shards) if text not in ALL] == ["ok"] and texts(shards)[:8] == ALL[:8]
    reasons = {Path(row["shard"]).name + ":" + row["key"]: row["reason"] for row in rows}
    assert set(reasons) == {"00002.tar:", "00004.tar:"} | {
        f"00003.tar:{key}" for key in ("nojpg", "broken", "empty", "notext", "twice", "latin", "good")
    }
    assert "no picture or video" in reasons["00003.tar:nojpg"] and "no known format" in reasons["00003.tar:broken"]
    assert "holds no text" in reasons["00003.tar:empty"] and "no member 'txt'" in reasons["00003.tar:notext"]
    assert "comes twice" in reasons["00003.tar:twice"] and "not UTF-8" in reasons["00003.tar:latin"]
    assert "duplicate key" in reasons["00003.tar:good"] and "not an uncompressed tar" in reasons["00004.tar:"]
    assert sum(shards.manifest.bad.values()) == len(rows) == 9
    shards.verify_hashes()


def test_remote_shards_are_read_through_the_cache(tmp_path, web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(web())
    index_shards(f"{server.address}/{{00000..00002}}.tar", tmp_path / "set", Layout(), workers=1)
    assert not list((tmp_path / "set" / "index").glob(".fetched-*"))
    shards = ShardSet(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert shards.shard_path(11) == f"{server.address}/00002.tar" and texts(shards) == ALL
    again = pickle.loads(pickle.dumps(shards))
    fetched = sum(server.requests.values())
    assert texts(again) == ALL and sum(server.requests.values()) == fetched  # from the cache
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 3
    server.server.shutdown()
    server.server.server_close()


def test_a_few_index_files_are_held(tmp_path, web, monkeypatch):
    monkeypatch.setattr("data_pipelines.shards.index_parts.MAX_OPEN_PARTS", 2)
    index_shards(str(web()), tmp_path / "set", Layout(), workers=1)
    shards = ShardSet(tmp_path / "set")
    assert isinstance(shards.index, IndexParts) and texts(shards) == ALL
    assert list(shards.index._open) == [1, 2] and MAX_OPEN_PARTS < 512
    assert texts(shards) == ALL


def test_columns_stand_beside_others_shards(tmp_path, web):
    index_shards(str(web()), tmp_path / "set", Layout(), workers=1)
    shards = ShardSet(tmp_path / "set")
    writer = ColumnWriter(tmp_path / "columns", shards, ["level"], {})
    for number in range(3):
        keys = shards.keys()[4 * number : 4 * number + 4]
        writer.write_rows(number, [{"key": key, "level": float(key)} for key in keys])
    writer.write_manifest()
    found = Columns(tmp_path / "columns", shards, ["level"], option="columns").load_numbers(["level"])
    assert found["level"].tolist() == list(map(float, shards.keys()))


def test_damaged_indexes_are_named(tmp_path, web):
    index_shards(str(web()), tmp_path / "set", Layout(), workers=1)
    part = tmp_path / "set" / "index" / "000001.npz"
    shards = ShardSet(tmp_path / "set")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(
        DataError, match=r"000001\.npz: missing, or not of \d+ bytes\. .* delete what is damaged and .*manifest"
    ):
        shards.load_sample(5)
    part.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match=r"000001\.npz: not a readable index"):
        shards.load_sample(5)
    tar = tmp_path / "tars" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(BadSample, match="checksum differs"):
        shards.load_sample(0)
    (tmp_path / "set" / "index.json").write_text('{"files": [["../x.npz", 1, "", 1]]}')
    with pytest.raises(DataError):
        ShardSet(tmp_path / "set")


def test_one_changed_bit_of_an_index_is_named_and_made_again(tmp_path, web, monkeypatch):
    """In numbers that would lead elsewhere, and in those that nothing else checks: sizes, seconds."""
    arguments = (str(web()), tmp_path / "set", Layout())
    index_shards(*arguments, workers=1)
    part = tmp_path / "set" / "index" / "000001.npz"
    whole, shards = part.read_bytes(), ShardSet(tmp_path / "set")
    with ZipFile(part) as archive:
        ends = [*[info.header_offset for info in archive.infolist()[1:]], archive.start_dir]
    assert len(ends) == 15
    for place in (end - 1 for end in ends):  # the last byte of every array
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"000001\.npz: not a readable index.*what is damaged and .*manifest\.json"):
            ShardSet(tmp_path / "set").load_sample(5)
    part.write_bytes(whole)
    assert texts(shards) == ALL
    part.unlink()
    (tmp_path / "set" / "manifest.json").unlink()
    read, inner = [], shard_index.read_shard
    monkeypatch.setattr(shard_index, "read_shard", lambda *job: read.append(job[1]) or inner(*job))
    index_shards(*arguments, workers=1)
    assert read == [1] and part.read_bytes() == whole


def test_addresses_as_webdatasets_users_write_them(tmp_path, web):
    tars = web()
    names = [str(tars / f"{number:05d}.tar") for number in range(3)]
    assert expand_addresses(f"{tars}/{{00000..00002}}.tar") == names
    assert expand_addresses(f"{tars}/{{00002,00000}}.tar") == [names[2], names[0]]
    assert expand_addresses([names[1], f"{tars}/0000[02].tar"]) == [names[1], names[0], names[2]]
    assert expand_addresses(f"{names[0]}::{names[2]}") == [names[0], names[2]]
    assert expand_addresses(str(tars)) == expand_addresses(f"file://{tars}") == names
    assert expand_addresses("s3://b/{a,b}/{0..1}.tar") == [f"s3://b/{x}/{n}.tar" for x in "ab" for n in (0, 1)]
    assert expand_addresses("hf://datasets/o/n/{08..09}.tar") == [f"hf://datasets/o/n/0{n}.tar" for n in (8, 9)]


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ("pipe:aws s3 cp s3://b/0.tar -", "runs a shell command, which is refused; give the address"),
        ("https://host/folder/", "a web server lists no files; name the tars"),
        ("ftp://host/0.tar", "not read from there"),
        ("/nowhere/{0..1}.tar", "no such tar"),
        ([], "names no tar"),
    ],
)
def test_addresses_that_are_refused(addresses, message):
    with pytest.raises(DataError, match=message):
        expand_addresses(addresses)


def test_wrong_arguments_end_in_plain_words(tmp_path, web, capsys):
    tars, out = web(1, 1), tmp_path / "set"
    for arguments, message in (
        ([], "give folder="),
        ([f"shards={tars}"], "needs output="),
        ([f"shards={tars}", f"output={out}", "layout=mine"], "Available: captions, img2dataset"),
        ([f"shards=[{tars},{tars}]", f"output={out}"], "is named twice"),
        ([f"shards={tars}", f"output={out}", "node=2", "nodes=2"], "node: got 2 with nodes=2"),
        ([f"shards={tars}", f"output={out}", "+layout.picture=jpg"], "expected text"),
        ([f"shards={tars}", f"output={out}", "layout.media=jpg"], "(lists of names)"),
        ([f"shards={tars}", f"output={out}", "layout.text=[txt]"], "expected text"),
    ):
        assert index(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, arguments
    assert shard_lists.index_shards(str(tars), out, Layout(), workers=1) is not None


def test_what_a_killed_process_was_fetching_is_removed(tmp_path, monkeypatch):
    old, new = tmp_path / ".fetched-old", tmp_path / ".fetched-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "shard.tar").write_bytes(b"half")
    os.utime(old, (0, 0))
    monkeypatch.setattr(shard_index, "download_file", lambda _, path: path.write_bytes(b"whole"))
    with shard_index.open_shard("https://example.org/0.tar", tmp_path) as file:
        assert file.read() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == [new.name]
