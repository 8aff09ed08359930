"""Hugging Face datasets of conversations with images."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources import iterate_records
from data_pipelines.sources.hf_messages import HFMessages


def _part(kind, text=None, index=None):
    return {"index": index, "text": text, "type": kind}


def _turn(role, *parts):
    return {"role": role, "content": list(parts)}


def _vsft(picture, number):
    """A row as HuggingFaceH4/llava-instruct-mix-vsft has it."""
    ask = _turn("user", _part("text", f"What is {number}?"), _part("image", index=0))
    return {
        "messages": [ask, _turn("assistant", _part("text", f"It is {number}."))],
        "images": [{"bytes": picture(number), "path": None}],
    }


def _write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def test_row_groups_of_parquet_files_are_parts(tmp_path, picture):
    rows = [_vsft(picture, number) for number in range(5)]
    _write(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3], row_group_size=2)
    _write(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:])
    _write(tmp_path / "data" / "test-00000-of-00001.parquet", rows[:1])
    source = HFMessages(folder=str(tmp_path), pattern="data/train-*.parquet")
    assert source.parts == 3
    source = pickle.loads(pickle.dumps(source))  # as builds on several processes do
    read = list(iterate_records(source))
    assert [sample.key for sample, _ in source.read(1)] == ["00000-00000002"]
    assert [sample.annotations[0].turns[1].text for sample, _ in read] == [f"It is {n}." for n in range(5)]
    assert [blobs for _, blobs in read] == [[picture(n)] for n in range(5)]
    assert read[0][0].annotations[0].turns[0].parts == (Text(text="What is 0?"), Media(item=0))
    assert len({sample.key for sample, _ in iterate_records(HFMessages(folder=str(tmp_path)))}) == 6


def test_other_layouts_of_columns(tmp_path, picture):
    (tmp_path / "2.png").write_bytes(picture(2))
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Two."}]
    _write(tmp_path / "a.parquet", [{"id": "x7", "conversations": talk, "image": {"bytes": None, "path": "2.png"}}])
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Three."}]
    _write(tmp_path / "b.parquet", [{"messages": plain, "images": [{"bytes": picture(3), "path": "3.png"}]}])
    _write(tmp_path / "c.parquet", [{"messages": plain}])
    (a, two), (b, three), (c, none) = iterate_records(HFMessages(folder=str(tmp_path), media=str(tmp_path)))
    assert [two, three, none] == [[picture(2)], [picture(3)], []] and a.meta == {"id": "x7"}
    assert [sample.annotations[0].turns[0].parts for sample in (a, b, c)] == [
        (Media(item=0), Text(text="What?")),
        (Media(item=0), Text(text="What?")),
        (Text(text="What?"),),
    ]


def test_preferences(tmp_path, picture):
    ask = _turn("user", _part("image"), _part("text", "Is it?"))
    yes, no = (_turn("assistant", _part("text", text)) for text in ("Yes.", "No."))
    images = [{"bytes": picture(1), "path": None}]
    rows = {
        "a": {"images": images, "prompt": [ask], "chosen": [yes], "rejected": [no]},  # trl-lib/rlaif-v
        "b": {"images": images, "chosen": [ask, yes], "rejected": [ask, no]},  # an implicit prompt
        "c": {"image": images[0], "prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
        "d": {"images": images, "chosen": [ask, yes], "rejected": [ask, ask, no]},
    }
    for name, row in rows.items():
        _write(tmp_path / f"{name}.parquet", [row])
    *samples, bad = iterate_records(HFMessages(folder=str(tmp_path)))
    for sample, blobs in samples:
        (annotation,) = sample.annotations
        assert annotation.turns[0].parts == (Media(item=0), Text(text="Is it?")) and blobs == [picture(1)]
        assert (annotation.turns[1].text, annotation.rejected.text) == ("Yes.", "No.")
    assert len(samples) == 3 and "chosen and rejected messages differ before the last one" in str(bad)


def test_saved_datasets_are_read_without_decoding(tmp_path, picture, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("data_pipelines.sources.hf_messages.PART_SIZE", 2)
    rows = [_vsft(picture, number) for number in range(3)]
    rows[1]["images"][0]["bytes"] = b"no image"
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "dict"))
    source = HFMessages(folder=str(tmp_path / "one"))
    (first, blobs), bad, (last, _) = iterate_records(source)
    assert source.parts == 2 and blobs == [picture(0)] and (first.key, last.key) == ("00000-00000000", "00000-00000002")
    assert isinstance(bad, BadSample) and "row 1: found bytes of no known format" in str(bad)
    assert next(iterate_records(HFMessages(folder=str(tmp_path / "dict"), subset="train"))) == (first, blobs)
    with pytest.raises(DataError, match="subset: got None; .* holds train"):
        HFMessages(folder=str(tmp_path / "dict"))


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no rows in .*parquet, and is not a folder of datasets' save_to_disk"):
        HFMessages(folder=str(tmp_path))
    _write(tmp_path / "x.parquet", [{"text": "x"}])
    with pytest.raises(DataError, match="no column messages, conversations or chosen; it has text"):
        HFMessages(folder=str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="x.parquet: not a readable parquet file"):
        HFMessages(folder=str(tmp_path))


def test_damaged_pages_are_an_error_that_names_the_file(tmp_path, picture):
    _write(tmp_path / "x.parquet", [_vsft(picture, 0)], compression="none", use_dictionary=False)
    source = HFMessages(folder=str(tmp_path))
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[4:64] = bytes([255]) * 60
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match="x.parquet: damaged: "):
        list(iterate_records(source))
