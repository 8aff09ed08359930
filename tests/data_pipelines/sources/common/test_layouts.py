"""Messages about records that another source reads name that source."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sources.alpaca import Alpaca
from data_pipelines.sources.common.layouts import suggest_source
from data_pipelines.sources.hf_messages import HFMessages
from data_pipelines.sources.img2dataset import Img2Dataset
from data_pipelines.sources.llava_json import LlavaJSON
from data_pipelines.sources.messages import Messages
from data_pipelines.sources.preference import PreferencePairs
from data_pipelines.sources.qwen_vl import QwenVL
from data_pipelines.sources.sharegpt import ShareGPT
from data_pipelines.sources.video_folder import VideoFolder

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
RECORDS = {
    "captions": {"image": "1.png", "text": "a cat"},
    "captions image_column=file_name text_column=caption": {"file_name": "1.png", "caption": "a cat"},
    "captions text_column=answer question_column=question": {"image": "1.png", "question": "q", "answer": "a"},
    "llava_json": {"id": "1", "image": "1.png", "conversations": TALK},
    "qwen_vl": {"conversations": [{"from": "user", "value": "<img>1.png</img>What?"}, TALK[1]]},
    "sharegpt": {"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "alpaca": {"instruction": "Add.", "input": "1, 1", "output": "2"},
    "preference_pairs": {"image": "1.png", "question": "q", "chosen": "a", "rejected": "b"},
    "video_folder": {"video": "1.mp4", "caption": "c"},
    "video_folder column=videoid": {"videoid": "1", "caption": "c"},
}
READERS = {
    "alpaca": Alpaca,
    "llava_json": LlavaJSON,
    "messages": Messages,
    "preference_pairs": PreferencePairs,
    "sharegpt": ShareGPT,
}
READS_TOO = {
    ("llava_json", "sharegpt"),
    ("messages", "llava_json"),
    ("messages", "sharegpt"),
    ("sharegpt", "messages"),
}


def test_records_are_told_by_their_fields():
    assert {name: suggest_source(record) for name, record in RECORDS.items()} == {name: name for name in RECORDS}
    assert [suggest_source(one) for one in ({}, [], None, {"image": "1.png"}, {"text": "x"})] == [""] * 5
    assert suggest_source({"image": "1.png", "conversations": None, "caption": "c"}) == "captions text_column=caption"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [name for name in RECORDS if name != "qwen_vl"])
def test_every_reader_of_a_file_names_the_other_source(tmp_path, picture, reader, name):
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "x.json").write_text(json.dumps([RECORDS[name]]))
    options = {} if reader in ("alpaca", "messages", "sharegpt") else {"images": str(tmp_path)}
    (record,) = READERS[reader](file=str(tmp_path / "x.json"), **options)
    if name == reader or (reader, name) in READS_TOO:
        assert not isinstance(record, BadSample)
    else:
        assert str(record).endswith(f"; source={name} reads such records")


def test_a_record_of_the_own_layout_gets_no_hint(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([RECORDS["llava_json"]]))
    (record,) = LlavaJSON(file=str(tmp_path / "x.json"), images=str(tmp_path))
    assert str(record) == f"record '1': {tmp_path}/1.png: No such file or directory"


def test_images_are_not_lost_by_readers_of_text(tmp_path):
    for reader, name in ((ShareGPT, "llava_json"), (Alpaca, "alpaca")):
        (tmp_path / "x.json").write_text(json.dumps([{**RECORDS[name], "image": "1.png"}]))
        (record,) = reader(file=str(tmp_path / "x.json"))
        assert isinstance(record, BadSample) and "has image, which this source does not read" in str(record)


def test_tables_and_folders_name_the_other_source(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([RECORDS["captions"]]))
    (record,) = VideoFolder(file=str(tmp_path / "x.json"), videos=str(tmp_path))
    assert str(record).endswith("; source=captions reads such records")
    pq.write_table(pa.Table.from_pylist([{"image": b"x", "caption": "y"}]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="it has image, caption; source=captions text_column=caption reads"):
        HFMessages(folder=str(tmp_path))
    with pytest.raises(DataError, match="source=captions text_column=caption reads such records"):
        list(Img2Dataset(folder=str(tmp_path), format="parquet").read(0))


@pytest.mark.parametrize("reader", READERS)
def test_tags_of_qwen_are_no_text(tmp_path, reader):
    (tmp_path / "x.json").write_text(json.dumps([RECORDS["qwen_vl"]]))
    with pytest.raises(DataError, match="x.json has images in <img> tags, .*; source=qwen_vl reads them"):
        READERS[reader](file=str(tmp_path / "x.json"))


def test_qwen_s_reader_names_captions(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([RECORDS["captions"]]))
    (record,) = QwenVL(file=str(tmp_path / "x.json"))
    assert str(record).endswith("KeyError: 'conversations'; source=captions reads such records")
