"""Missing, damaged and hostile files: one clear error each, nothing executed, nothing silently lost."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import index_folder
from data_pipelines.indexing import tar_samples
from data_pipelines.lint import main as lint
from data_pipelines.media.limits import check_pixels, read_header
from data_pipelines.shards.index_file import Index
from data_pipelines.shards.layout import OwnLayout
from data_pipelines.shards.members import Member, unique_key
from data_pipelines.shards.shard_set import ShardSet


def test_missing_folder_and_missing_manifest_say_how_to_build(tmp_path, shard_set):
    with pytest.raises(DataError, match=r"nothing.*no such folder.*data_pipelines.build source=<name> output="):
        ShardSet(tmp_path / "nothing")
    folder = shard_set()
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"tars without manifest.json.*data_pipelines.index folder="):
        ShardSet(folder)


def test_every_missing_and_truncated_shard_is_named(shard_set):
    folder = shard_set()
    (folder / "shard-000000.tar").unlink()
    cut = folder / "shard-000002.tar"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-700])
    with pytest.raises(DataError) as error:
        ShardSet(folder)
    assert "shard-000000.tar: missing; the manifest lists 3 shards" in str(error.value)
    assert f"shard-000002.tar: {size - 700} bytes, the manifest says {size}" in str(error.value)


def test_damaged_index_and_manifest(shard_set):
    folder = shard_set()
    data = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match="not a readable index"):
        ShardSet(folder)
    (folder / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="manifest.json: malformed"):
        ShardSet(folder)


@pytest.mark.parametrize("key", ["name", "bytes", "sha256", "samples"])
@pytest.mark.parametrize("value", [None, [], -1, "12", 2**80, 1.5])
def test_a_manifest_of_wrong_types_is_malformed(shard_set, key, value):
    if key in ("name", "sha256") and value == "12":
        return  # a text; that no such file is there is said elsewhere
    folder = shard_set()
    good = json.loads((folder / "manifest.json").read_text())
    for changed in (
        good | {"index": good["index"] | {key: value}},
        good | {"shards": [good["shards"][0] | {key: value}, *good["shards"][1:]]},
        good | {"bad": value},
    ):
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"manifest\.json: malformed: "):
            ShardSet(folder)


def test_manifest_cannot_name_files_elsewhere(shard_set):
    folder = shard_set()
    data = json.loads((folder / "manifest.json").read_text())
    data["shards"][0]["name"] = "../other.tar"
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="is a path"):
        ShardSet(folder)


class _Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_index_never_unpickles(tmp_path):
    np.savez(tmp_path / "index.npz", shard=np.array([_Exploit()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="O.*only flat arrays of numbers"):
        Index.load(tmp_path / "index.npz")


@pytest.mark.parametrize("member", [0, 1])
def test_one_corrupt_byte_is_found_and_named(shard_set, member):
    folder = shard_set()
    place = ShardSet(folder).index.locate_sample(5).members[member]
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[place.offset + place.size // 2] ^= 1
    path.write_bytes(data)
    shards = ShardSet(folder)
    with pytest.raises(BadSample, match=rf"shard-000001.tar, key 'sample-005': member {place.name} is corrupt"):
        shards.load_sample(5)
    assert shards.load_sample(4)[0].key == "sample-004" and shards.load_sample(6)[0].key == "sample-006"
    with pytest.raises(DataError, match="shard-000001.tar: sha256"):
        shards.verify_hashes()
    assert lint([f"folder={folder}"]) == 1


def test_foreign_tars_become_captioned_images(tmp_path, tar, picture):
    folder = tmp_path / "cc3m"
    tar(
        folder / "00000.tar",
        [
            ("./000000001.jpg", picture(1, "JPEG")),
            ("./000000001.txt", b" a cat \n"),
            ("./000000001.json", b'{"url": "x"}'),
        ],
    )
    tar(folder / "00001.tar", [("b/2.seg.png", picture(2)), ("b/2.txt", b"two"), ("b/2.x.webp", picture(2, "WEBP"))])
    index_folder(folder, source="cc3m")
    shards = ShardSet(folder)
    assert shards.keys() == ["000000001", "b_2"] and shards.manifest.source == "cc3m"
    first, blobs = shards.load_sample(0)
    assert [turn.role for turn in first.annotations[0].turns] == ["user", "assistant"]
    assert first.annotations[0].turns[1].text == "a cat" and first.meta == {"url": "x"}
    assert blobs == [picture(1, "JPEG")] and (first.media[0].width, first.media[0].height) == (12, 8)
    assert [item.name for item in shards.load_sample(1)[0].media] == ["0.png", "1.webp"] and len(
        shards.media_items(1)
    ) == 2


def test_our_own_shards_index_to_the_same_set(shard_set):
    folder = shard_set()
    before = ShardSet(folder)
    (folder / "manifest.json").unlink()
    index_folder(folder)
    after = ShardSet(folder)
    assert after.fingerprint == before.fingerprint
    assert [after.load_sample(i) for i in range(10)] == [before.load_sample(i) for i in range(10)]
    assert [after.index.locate_sample(i).members for i in range(10)] == [
        before.index.locate_sample(i).members for i in range(10)
    ]


def _members(picture, *keys):
    return [(f"{key}.{name}", data) for key in keys for name, data in (("png", picture()), ("txt", b"x"))]


def _left_out(folder, kept: list[str]) -> dict[str, str]:
    """Index `folder`, which holds the samples `kept`; the reasons for the others, by `<shard>:<key>`."""
    manifest = index_folder(folder, max_bad_share=1)
    shards = ShardSet(folder)
    assert shards.keys() == kept == [sample.key for sample, _ in shards]
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sum(manifest.bad.values()) == len(rows) and manifest.layout == {}
    assert lint([f"folder={folder}", "max_problems=0"]) == 0
    return {f"{Path(row['shard']).name}:{row['key']}": row["reason"] for row in rows}


def test_interleaved_and_duplicate_samples_are_left_out(tmp_path, tar, picture):
    a, b, c = (_members(picture, key) for key in "abc")
    tar(tmp_path / "mixed" / "0.tar", [a[0], b[0], a[1], b[1], *c])
    split = "duplicate key, or its members do not lie one after another"
    assert split in _left_out(tmp_path / "mixed", ["c"])["0.tar:a"]
    tar(tmp_path / "late" / "0.tar", [*a, *b, ("a.webp", picture(1, "WEBP"))])
    assert _left_out(tmp_path / "late", ["a", "b"]) == {"0.tar:a": f"sample 'a': {split}"}
    tar(tmp_path / "twice" / "0.tar", a)
    tar(tmp_path / "twice" / "1.tar", [*a, *b])
    assert "an earlier shard has it" in _left_out(tmp_path / "twice", ["a", "b"])["1.tar:a"]
    tar(tmp_path / "part" / "0.tar", [*a, ("c.png", picture())])
    expected = "sample 'c': members ['png']; expected our json, or one txt and some media"
    assert _left_out(tmp_path / "part", ["a"]) == {"0.tar:c": expected}
    tar(tmp_path / "same" / "0.tar", [a[0], a[0], a[1], *b])
    assert _left_out(tmp_path / "same", ["b"]) == {"0.tar:a": "sample 'a': member 'png' comes twice"}


def test_too_many_bad_samples_are_an_error(tmp_path, tar, picture):
    tar(tmp_path / "0.tar", [*_members(picture, "a"), ("b.png", picture()), ("c.txt", b"x")])
    with pytest.raises(DataError, match=r"2 of 3 samples are unusable, max_bad_share=0.1; .*quarantine.jsonl.*\n.*'b'"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pth", "a.png.pickle", "noextension", "a.avi", "._a.png"])
def test_other_members_are_left_alone(tmp_path, tar, picture, name):
    a = _members(picture, "a")
    tar(tmp_path / "0.tar", [a[0], (name, pickle.dumps(_Exploit())), a[1]])
    assert _left_out(tmp_path, ["a"]) == {}
    assert [member.name for member in ShardSet(tmp_path).index.locate_sample(0).members] == ["png", "txt"]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE"])
def test_links_are_left_out(tmp_path, kind):
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as file:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = getattr(tarfile, kind), "/etc/passwd"
        file.addfile(info)
    assert "'txt' is a link or another thing" in _left_out(tmp_path, [])["0.tar:a"]


@pytest.mark.parametrize("keep", [1300, 700, 100])
def test_truncated_foreign_tar(tmp_path, tar, picture, keep):
    tar(tmp_path / "0.tar", _members(picture, "a", "b"))
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:keep])
    with pytest.raises(DataError, match="0.tar"):
        index_folder(tmp_path)


@pytest.mark.parametrize("damage", ["cut between members", "cut in a header", "damaged header"])
def test_a_tar_that_ends_early_is_not_taken_for_a_shorter_one(tmp_path, tar, picture, damage):
    import tarfile

    path = tmp_path / "0.tar"
    tar(path, _members(picture, "a", "b"))
    with tarfile.open(path) as file:
        second = file.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    if damage == "damaged header":
        data[second + 10] ^= 255
    path.write_bytes(data[: {"cut between members": second, "cut in a header": second + 300}.get(damage)])
    with pytest.raises(DataError, match=f"0.tar: truncated or .*no end mark at byte {second}"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_sparse_member_is_refused_before_it_is_unpacked(tmp_path):
    import tarfile

    info = tarfile.TarInfo("a.txt")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for start, number in ((386, 0), (398, 0), (483, 2**29)):  # GNU: offset and bytes of a piece, unpacked size
        header[start : start + 12] = b"%011o\0" % number
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    (tmp_path / "0.tar").write_bytes(header + bytes(1024))
    assert "'txt' is a link or another thing" in _left_out(tmp_path, [])["0.tar:a"]


def test_compressed_tar_and_pipe_names_are_never_run(tmp_path):
    (tmp_path / "0.tar").write_bytes(zlib.compress(b"x" * 2000))
    with pytest.raises(DataError, match="truncated or not an uncompressed tar"):
        index_folder(tmp_path)
    with pytest.raises(DataError, match="not read from there; allowed: a folder, file://, http://"):
        ShardSet(f"pipe:touch {tmp_path}/executed")
    assert not (tmp_path / "executed").exists()


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("side", [9000, 10000, 60000])
def test_decompression_bombs_are_refused_from_the_header(side):
    with pytest.raises(BadSample, match="too large|at most"):
        read_header(_png_header(side, side))


def test_image_limits(picture):
    assert read_header(picture(size=(30, 20))) == (30, 20, "PNG")
    with pytest.raises(BadSample, match="at most 10 are read"):
        read_header(picture(), max_bytes=10)
    with pytest.raises(BadSample, match="found GIF; pictures are read from JPEG, PNG, WEBP"):
        read_header(b"GIF89a" + bytes(50))
    with pytest.raises(BadSample, match="does not decode"):
        check_pixels(picture(kind="JPEG", size=(200, 200))[:-200])


def test_lint_finds_what_a_schema_cannot(tmp_path, sample, capsys):
    from dataclasses import replace

    from data_pipelines.sample import Annotation, Media, Text, Turn
    from data_pipelines.shards.tar_writer import ShardWriter

    record, blobs = sample(0, media=2)
    turns = (
        Turn(role="user", parts=(Media(item=0), Media(item=0), Text(text="<image> what?"))),
        Turn(role="assistant", parts=(Text(text=" "),)),
    )
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(*sample(5))
        writer.write_sample(replace(record, annotations=(Annotation(turns=turns),)), [blobs[0][:-20], blobs[1]])
    assert lint([f"folder={tmp_path / 'set'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for problem in ("does not decode", "more than once", "empty answer", "<image> left", "only [0] are placed"):
        assert any(problem in line and "shard-000000.tar, key 'sample-000'" in line for line in lines), problem
    assert "5 problems" in lines[-1] and not any("sample-005" in line for line in lines)


def test_lint_finds_damage_between_the_members(shard_set, capsys):
    folder = shard_set()
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the end of the tar holds nothing
    path.write_bytes(data)
    assert lint([f"folder={folder}"]) == 1
    assert "shard-000001.tar: sha256" in capsys.readouterr().out


def test_lint_names_truncated_and_duplicated(shard_set, capsys):
    folder = shard_set()
    assert lint([f"folder={folder}"]) == 0
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    assert lint([f"folder={folder}"]) == 1
    out = capsys.readouterr().out
    assert "shard-000001.tar: 1500 bytes" in out and "key 'sample-000': duplicate" in out
    assert io.StringIO(out).readlines()[-1].endswith("problems\n")


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize(
    "name, head", [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"icc\0\0")]
)
@pytest.mark.parametrize("early", [True, False])
def test_chunks_that_unpack_to_much_are_refused(picture, name, head, early):
    data = picture()
    bomb = _png_chunk(name, head + zlib.compress(bytes(64 * 2**20), 9))
    place = 33 if early else len(data) - 12  # after IHDR, or before IEND
    bad = data[:place] + bomb + data[place:]
    assert len(bad) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match="too large|does not decode|not a readable image") as error:
            check_pixels(bad)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert error.value.kind == "image"


def test_names_of_any_alphabet_are_samples_of_their_own(tmp_path, tar, picture):
    names = ["犬", "猫", "dog(1)", "dog[1]", "a" * 90 + "1", "a" * 90 + "2", "plain", "in/plain"]
    members = [
        (f"{name}.{kind}", data) for name in names for kind, data in (("png", picture()), ("txt", name.encode()))
    ]
    tar(tmp_path / "0.tar", members)
    index_folder(tmp_path, source="x", license="y")
    shards = ShardSet(tmp_path)
    assert [shards.load_sample(i)[0].annotations[0].turns[1].text for i in range(len(names))] == names
    keys = shards.keys()
    assert len(set(keys)) == len(names) and max(map(len, keys)) <= 80 and keys[-2:] == ["plain", "in_plain"]
    assert keys[2].startswith("dog_1_-") and keys[:2] == ShardSet(tmp_path).keys()[:2]
    from data_pipelines.sources import iterate_records
    from data_pipelines.sources.img2dataset import Img2Dataset

    assert [record[0].key for record in iterate_records(Img2Dataset(folder=str(tmp_path), columns=[]))] == keys


def test_samples_of_other_names_are_not_merged(tmp_path, tar, picture):
    members = [("IMG (1).jpg", picture(kind="JPEG")), ("IMG (1).txt", b"first"), ("IMG [1].png", picture())]
    tar(tmp_path / "0.tar", members)
    names = [unique_key(name) for name in ("IMG (1)", "IMG [1]")]
    assert "members ['png']" in _left_out(tmp_path, names[:1])[f"0.tar:{names[1]}"]


def test_a_sample_of_many_members_is_read_in_a_time_that_does_not_square(tmp_path, tar):

    class Name(str):
        compared = 0

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    tar(tmp_path / "0.tar", [(f"a.{n}.txt", b"x") for n in range(2000)])
    with pytest.MonkeyPatch.context() as patch, open(tmp_path / "0.tar", "rb") as file:
        patch.setattr(tar_samples, "Member", lambda name, *place: Member(Name(name), *place))
        ((_, found),) = tar_samples.scan_samples(file, OwnLayout())
    assert len(found) == 2000 and Name.compared < 20_000
    reason = _left_out(tmp_path, [])["0.tar:a"]
    assert len(reason) < 300 and "and 1994 more (a key ends at the first dot of a name)" in reason


@pytest.mark.parametrize("kind", ["pax", "name"])
def test_headers_that_tarfile_would_read_whole_are_bounded(tmp_path, kind):
    import tarfile

    info = tarfile.TarInfo("a.txt")
    form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
    if kind == "pax":
        info.pax_headers = {"comment": "x" * (8 * 2**20)}
    else:
        info.name = "x" * (8 * 2**20) + ".txt"
    (tmp_path / "0.tar").write_bytes(info.tobuf(form) + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="extended header of .* bytes; at most 1048576 are read"):
            index_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_json_nested_deeply_is_one_error(shard_set):
    folder = shard_set()
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="manifest.json: malformed: RecursionError"):
        ShardSet(folder)
