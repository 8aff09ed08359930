"""FineVision's rows: exchanges about images, chosen by their ratings."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources import iterate_records
from data_pipelines.sources.finevision import FineVision

Picture = Callable[[int], bytes]


def row(picture: Picture, images: int = 1, exchanges: int = 2, **ratings: Any) -> dict[str, Any]:
    return {
        "images": [{"bytes": picture(number), "path": None} for number in range(images)],
        "texts": [{"user": f"What is {n}?", "assistant": f"It is {n}."} for n in range(exchanges)],
        "source": "allava",
        "relevance_ratings": ratings.get("relevance", [5] * exchanges),
        "formatting_ratings": ratings.get("formatting", [None] * exchanges),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.parent


def test_images_stand_before_the_first_question(tmp_path: Path, picture: Picture) -> None:
    folder = write(tmp_path / "train-0.parquet", [row(picture, images=2), row(picture, images=0)])
    source = pickle.loads(pickle.dumps(FineVision(folder=str(folder))))
    assert source.parts == 1
    (first, blobs), (second, none) = iterate_records(source)
    (annotation,) = first.annotations
    assert annotation.turns[0].parts == (Media(item=0), Media(item=1), Text(text="What is 0?"))
    assert [turn.text for turn in annotation.turns[1:]] == ["It is 0.", "What is 1?", "It is 1."]
    assert blobs == [picture(0), picture(1)] and none == [] and second.media == ()
    assert (first.key, first.meta) == ("train-0-0000000", {"source": "allava"})


def test_low_ratings_are_left_out_and_counted(tmp_path: Path, picture: Picture) -> None:
    rows = [row(picture, relevance=[2, 5]), row(picture, relevance=[1, 1]), row(picture, formatting=[None, 2])]
    source = FineVision(folder=str(write(tmp_path / "a.parquet", rows)), min_rating=3)
    read = [sample for sample, _ in iterate_records(source)]
    assert [sample.key[-1] for sample in read] == ["0", "2"], "the second row has nothing left"
    assert read[0].annotations[0].turns[0].parts == (Media(item=0), Text(text="What is 1?"))
    assert read[0].meta["skipped"] == ["relevance rating below 3"]
    assert read[1].meta["skipped"] == ["formatting rating below 3"]


def test_rows_with_many_images_are_left_out(tmp_path: Path, picture: Picture) -> None:
    folder = write(tmp_path / "a.parquet", [row(picture, images=5), row(picture, images=4)])
    assert [len(blobs) for _, blobs in iterate_records(FineVision(folder=str(folder), max_images=4))] == [4]


def test_rows_that_hold_nothing_are_bad(tmp_path: Path, picture: Picture) -> None:
    blank = row(picture) | {"texts": [{"user": "What?", "assistant": " "}] * 2}
    missing = row(picture) | {"images": [None]}
    cut = row(picture) | {"relevance_ratings": [5]}
    read = list(FineVision(folder=str(write(tmp_path / "a.parquet", [blank, missing, cut]))).read(0))
    assert all(isinstance(one, BadSample) for one in read)
    said = [str(one) for one in read]
    assert said[0] == "a.parquet, row 0: no answer" and "image 0 of its 1 images is null" in said[1]
    assert "row 2: malformed: IndexError" in said[2]


def test_other_columns_and_numbers_are_refused(tmp_path: Path, picture: Picture) -> None:
    folder = write(tmp_path / "a.parquet", [{"messages": "x"}])
    with pytest.raises(DataError, match="has no column images, texts; it has messages"):
        FineVision(folder=str(folder))
    with pytest.raises(DataError, match="min_rating 6"):
        FineVision(folder=str(folder), min_rating=6)
