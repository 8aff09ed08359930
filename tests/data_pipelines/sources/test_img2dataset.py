"""Images with captions as img2dataset writes them."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources import iterate_records
from data_pipelines.sources.img2dataset import Img2Dataset


def _meta(key, caption="A cat.", **more):
    """The JSON that img2dataset writes beside an image."""
    return {
        "caption": caption,
        "url": f"http://x/{key}.png",
        "similarity": 0.25,
        "punsafe": float("nan"),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 12,
        "height": 8,
        "exif": "{}",
        "sha256": "0" * 64,
        **more,
    }


def _members(key, image, caption="A cat."):
    meta = json.dumps(_meta(key, caption), indent=4).encode()
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode()), (f"{key}.json", meta)]


def _reasons(read):
    return [str(record) for record in read if isinstance(record, BadSample)]


def test_tars_are_parts_and_columns_become_meta(tmp_path, tar, picture):
    image = picture(1, "JPEG")
    tar(tmp_path / "00001.tar", _members("000010000", image, "Two."))
    tar(tmp_path / "00000.tar", [*_members("000000000", image), *_members("000000003", image)])
    (tmp_path / "00000.parquet").touch()  # img2dataset writes them, and _stats.json, beside its tars
    source = Img2Dataset(folder=str(tmp_path), columns=["similarity", "punsafe"], name="cc3m")
    assert source.parts == 2
    source = pickle.loads(pickle.dumps(source))  # as builds on several processes do
    (second, _), (first, blobs) = *source.read(1), next(source.read(0))
    assert (second.key, first.key, first.source) == ("000010000", "000000000", "cc3m") and blobs == [image]
    (annotation,) = first.annotations
    assert [turn.parts for turn in annotation.turns] == [(Media(item=0),), (Text(text="A cat."),)]
    assert first.meta == {"similarity": 0.25, "punsafe": None}  # not a number: no JSON has it


def test_what_is_refused_costs_its_own_sample_alone(tmp_path, tar, picture):
    image = picture(1, "JPEG")
    members = [
        *_members("good1", image),
        *_members("pickled", image), ("pickled.pkl", b"cos\nsystem\n(S'false'\ntR."),
        ("bare.jpg", image),
        *_members("text", b"<html>"),
        *_members("empty", image, " "),
        ("odd.jpg", image), ("odd.json", b"[1]"),
        ("twice.jpg", image), ("twice.png", image), ("twice.txt", b"x"),
        *_members("good2", image),
    ]  # fmt: skip
    tar(tmp_path / "00000.tar", members)
    read = list(iterate_records(Img2Dataset(folder=str(tmp_path), columns=[])))
    assert [record[0].key for record in read if not isinstance(record, BadSample)] == ["good1", "good2"]
    assert [reason.removeprefix(f"{tmp_path}/00000.tar: ")[:44] for reason in _reasons(read)] == [
        "'pickled': member 'pkl' refused",
        "'bare': has no caption",
        "'text': found an HTML page; read are JPEG, P",
        "'empty': has no caption",
        "'odd': its json holds a list, not an object",
        "'twice': members ['jpg', 'png', 'txt']; expe",
    ]


def test_links_are_not_followed(tmp_path, picture):
    with tarfile.open(tmp_path / "00000.tar", "w") as file:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert _reasons(iterate_records(Img2Dataset(folder=str(tmp_path)))) == [
        f"{tmp_path}/00000.tar: 'a': member 'jpg' refused"
    ]


@pytest.mark.parametrize(("member", "offset"), [("b.txt", 3), ("b.jpg", -512), ("b.jpg", -100)])
def test_a_cut_tar_keeps_what_came_before(tmp_path, tar, picture, member, offset):
    image = picture(1, "JPEG")
    tar(tmp_path / "00000.tar", [*_members("a", image), *_members("b", image)])
    with tarfile.open(tmp_path / "00000.tar") as file:
        cut = file.getmember(member).offset_data + offset
    os.truncate(tmp_path / "00000.tar", cut)
    tar(tmp_path / "00001.tar", _members("c", image))
    read = list(iterate_records(Img2Dataset(folder=str(tmp_path))))
    assert [record[0].key for record in read if not isinstance(record, BadSample)] == ["a", "c"]
    assert len(_reasons(read)) == 1 and "the rest of it is lost" in _reasons(read)[0]


def test_missing_columns_are_named(tmp_path, tar, picture):
    tar(tmp_path / "00000.tar", _members("a", picture(1, "JPEG")))
    (reason,) = _reasons(iterate_records(Img2Dataset(folder=str(tmp_path), columns=["clip_score"])))
    assert "'a': has no column clip_score; it has caption, url, similarity" in reason


def _parquet(path, image):
    rows = [
        {**_meta("000000000", punsafe=0.5), "jpg": image, "txt": "A cat."},
        {
            **_meta("000000001", status="failed_to_download", error_message="HTTP Error 404: Not Found", width=None),
            "jpg": None,
            "txt": None,
        },
        {**_meta("000000002", caption=None), "jpg": image, "txt": "From txt."},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_parquet_rows_and_their_failures(tmp_path, picture):
    image = picture(1, "JPEG")
    _parquet(tmp_path / "00000.parquet", image)
    options = {"folder": str(tmp_path), "format": "parquet", "columns": ["punsafe"]}
    (first, blobs), failed, (last, _) = iterate_records(Img2Dataset(**options))
    assert first.meta == {"punsafe": 0.5} and blobs == [image] and first.key == "000000000"
    assert str(failed).endswith("'000000001': status 'failed_to_download': HTTP Error 404: Not Found")
    assert last.annotations[0].turns[1].text == "From txt." and last.meta == {"punsafe": None}
    assert [sample.key for sample, _ in iterate_records(Img2Dataset(failed="drop", **options))] == [
        "000000000",
        "000000002",
    ]
    with pytest.raises(DataError, match="has no column clip_score; it has .*'jpg'"):
        list(iterate_records(Img2Dataset(**{**options, "columns": ["clip_score"]})))


def test_files_give_what_tars_give(tmp_path, tar, picture):
    members = [*_members("000000000", picture(1, "JPEG")), *_members("000000001", picture(2, "PNG"), "A dog.")]
    tar(tmp_path / "tars" / "00000.tar", members)
    (tmp_path / "files" / "00000").mkdir(parents=True)
    for name, data in [*members, ("000000002.npy", b"x")]:
        (tmp_path / "files" / "00000" / name).write_bytes(data)
    *samples, refused = iterate_records(Img2Dataset(folder=str(tmp_path / "files"), format="files"))
    assert samples == list(iterate_records(Img2Dataset(folder=str(tmp_path / "tars")))) and len(samples) == 2
    assert "'000000002': file '000000002.npy' refused" in str(refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds no .tar files"),
        ({"format": "files"}, "holds no folders 00000"),
        ({"format": "tfrecord"}, "format: got 'tfrecord'; allowed: webdataset, parquet, files"),
        ({"failed": "keep"}, "failed: got 'keep'; allowed: bad, drop"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        Img2Dataset(folder=str(tmp_path), **options)
