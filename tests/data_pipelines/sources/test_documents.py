"""Interleaved documents: MMC4 by OpenFlamingo's rule, OBELICS with images by URL and inside."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources import iterate_records
from data_pipelines.sources.mmc4 import MMC4
from data_pipelines.sources.obelics import Obelics, file_name


def info(name, index, similarity=0.3, **more):
    return {
        "face_detections": None,
        "image_name": name,
        "raw_url": f"https://a.b/{name}",
        "matched_text_index": index,
        "matched_sim": similarity,
    } | more


def mmc4_line(*images, texts=("One.", "Two. ", " Three.")):
    return json.dumps({"url": "u", "text_list": list(texts), "image_info": images, "similarity_matrix": []}) + "\n"


@pytest.fixture
def mmc4(tmp_path, picture):
    folder = tmp_path / "images" / "docs_shard_0_v2"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "page.png").write_bytes(b"<html>404</html>")

    def read(*lines, images=tmp_path / "images", **options):
        (tmp_path / "docs_shard_0_v2.jsonl").write_text("".join(lines))
        options = {"min_bytes": 0} | options
        return list(iterate_records(MMC4(folder=str(tmp_path), images=str(images) if images else None, **options)))

    return read


def parts_of(record):
    (turn,) = record[0].annotations[0].turns
    assert turn.role == "assistant"
    return turn.parts


def test_mmc4_image_stands_before_its_sentence(mmc4, picture):
    line = mmc4_line(info("1.png", 2), info("0.png", 1), info("2.png", 2), info("3.png", 0, 0.23), info("no.png", 0))
    (record,) = mmc4(line)
    assert parts_of(record) == (
        Text(text="One."),
        Media(item=0),
        Text(text="Two."),
        Media(item=1),
        Media(item=2),
        Text(text="Three."),
    )
    assert record[1] == [picture(0), picture(1), picture(2)]
    assert record[0].key == "docs_shard_0_v2-000000" and record[0].meta == {"url": "u"}


def test_mmc4_limits(mmc4, picture):
    line = mmc4_line(info("1.png", 2), info("page.png", 0), info("0.png", 1))
    assert parts_of(mmc4(line, max_images=1)[0])[0] == Text(text="One. Two.")
    assert mmc4(line, min_images=3) == [] and mmc4(line, min_bytes=10_000) == []
    assert len(mmc4(mmc4_line(info("3.png", 0, 0.24)))) == 1
    with pytest.raises(DataError, match="min_images 3, max_images 2; allowed"):
        mmc4(line, min_images=3, max_images=2)


def test_mmc4_images_in_tars_in_records_and_zipped_documents(mmc4, tmp_path, tar, picture):
    tar(tmp_path / "tars" / "docs_shard_0_v2.tar", [("x/0.png", picture(7)), ("1.jpg", b"no image")])
    line = mmc4_line(info("0.png", 0), info("1.jpg", 1))
    assert mmc4(line, images=tmp_path / "tars")[0][1] == [picture(7)]
    inside = mmc4_line(info("x", 0, image_base64=base64.b64encode(picture(9)).decode()))
    assert mmc4(inside, images=None)[0][1] == [picture(9)]
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_shard_0_v2.jsonl", line + line)
    (tmp_path / "docs_shard_0_v2.jsonl").unlink()
    source = MMC4(folder=str(tmp_path), images=str(tmp_path / "tars"), min_bytes=0)
    assert [sample.key[-1] for sample, _ in iterate_records(source)] == ["0", "1"]


@pytest.mark.parametrize("damage", ["deflated bytes", "encrypted", "unknown compression"])
def test_mmc4_zips_that_do_not_unpack_are_named(tmp_path, damage):
    path = tmp_path / "docs_shard_0.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs.jsonl", "".join(map(str, range(5000))))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    if damage == "deflated bytes":
        data[60:90] = bytes(255 - byte for byte in data[60:90])
    elif damage == "encrypted":
        data[6], data[entry + 8] = 1, 1
    else:
        data[8], data[entry + 10] = 97, 97
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"docs_shard_0.jsonl.zip: "):
        list(iterate_records(MMC4(folder=str(tmp_path))))


def test_mmc4_images_in_a_cut_tar(tmp_path, tar, picture):
    (tmp_path / "docs_shard_0.jsonl").write_text(mmc4_line(info("0.png", 0)))
    tar(tmp_path / "docs_shard_0.tar", [(f"{number}.png", picture(number)) for number in range(2)])
    with open(tmp_path / "docs_shard_0.tar", "r+b") as file:
        file.truncate(1024)
    with pytest.raises(DataError, match=r"images: docs_shard_0.tar: truncated"):
        list(iterate_records(MMC4(folder=str(tmp_path), images=str(tmp_path))))


def test_mmc4_unusable_documents_stand_in_their_place(mmc4):
    bad = [mmc4_line(info("1.png", 5)), "{\n", mmc4_line(info("../../docs_shard_0_v2.jsonl", 0)), '{"text_list": []}\n']
    first, second, last, good = mmc4(*bad, mmc4_line(info("1.png", 0)))  # the one that leaves the folder has no image
    for error, reason in zip((first, second, last), ("line 1: images match", "line 2: not JSON", "line 4: malf")):
        with pytest.raises(BadSample, match=f"docs_shard_0_v2.jsonl, {reason}"):
            raise error
    assert good[0].key.endswith("4")


def obelics(folder, *rows, **options):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "train-0.parquet")
    return list(iterate_records(Obelics(folder=str(folder), **options)))


@pytest.mark.parametrize("naming", ["sha256", "md5", "basename"])
def test_obelics_images_by_url(tmp_path, picture, naming):
    urls = ["https://a.b/c/one%20x.jpg?w=3", "https://a.b/gone.jpg", "https://a.b/two.png"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / (file_name(urls[0], naming) + (".jpg" * (naming != "basename")))).write_bytes(picture(1))
    (tmp_path / "images" / file_name(urls[2], naming)).write_bytes(picture(2))
    row = {
        "images": [urls[0], None, urls[1], None, urls[2]],
        "texts": [None, "First.\n\nPart", None, "Second", None],
        "metadata": "[]",
        "general_metadata": '{"url": "u"}',
    }
    options = {"images": str(tmp_path / "images"), "naming": naming}
    (record,) = obelics(tmp_path / "set", row, row | {"images": [None] * 5, "texts": ["a"] * 5}, **options)
    assert parts_of(record) == (Media(item=0), Text(text="First.\n\nPart\n\nSecond"), Media(item=1))
    assert record[1] == [picture(1), picture(2)] and record[0].key == "train-0-0000000"
    assert parts_of(obelics(tmp_path / "set", row, max_images=1, **options)[0])[-1] == Text(
        text="First.\n\nPart\n\nSecond"
    )


def test_file_names():
    assert file_name("https://a.b/x", "sha256") == hashlib.sha256(b"https://a.b/x").hexdigest()
    assert [file_name(url, "basename") for url in ("https://a.b/", "https://a.b/c%2Fd.jpg")] == ["_", "d.jpg"]


def test_obelics_images_inside(tmp_path, picture):
    row = {"images": [{"bytes": picture(3), "path": None}, None], "texts": [None, "x"]}
    ((sample, blobs),) = obelics(tmp_path / "set", row)
    assert blobs == [picture(3)] and sample.annotations[0].turns[0].parts == (Media(item=0), Text(text="x"))


def test_unusable_obelics(tmp_path, picture):
    rows = [
        {"images": [picture(), None], "texts": ["both", "x"]},
        {"images": [picture()], "texts": [None]},
        {"images": [None], "texts": []},
    ]
    bad = obelics(tmp_path / "set", *rows, min_images=0)
    for error, reason in zip(bad, ("row 0: 2 images and 2 texts", "row 1: no text", "row 2: 1 images and 0 texts")):
        with pytest.raises(BadSample, match=f"train-0.parquet, {reason}"):
            raise error
    (tmp_path / "set" / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="train-0.parquet"):
        list(iterate_records(Obelics(folder=str(tmp_path / "set"))))
    with pytest.raises(DataError, match="naming: got 'crc'; allowed: sha256, md5, basename"):
        Obelics(folder=str(tmp_path / "set"), naming="crc")
    with pytest.raises(DataError, match="holds no .parquet files"):
        Obelics(folder=str(tmp_path))
