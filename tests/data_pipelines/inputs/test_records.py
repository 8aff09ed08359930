"""The records of one file."""

from __future__ import annotations

import csv
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs import files, records
from data_pipelines.inputs.records import JsonLines, ParquetRows, describe_record, read_records


def test_json_lines_have_places_numbers_and_a_bound(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes('{"a": "é"}\n\n  \r\n[1]\r\n{broken\n"0123456789"\n2'.encode())
    monkeypatch.setattr(records, "_PIECE", 4)
    monkeypatch.setattr(records, "MAX_LINE", 12)
    lines = pickle.loads(pickle.dumps(JsonLines(tmp_path / "x.jsonl")))
    assert [lines.line_number(i) for i in range(len(lines))] == [1, 4, 5, 6, 7]
    assert lines[3:2] == [] and lines[:2] == [{"a": "é"}, [1]]
    assert [describe_record(lines, i) for i in (0, 2)] == ["line 1", "line 5"]
    assert (lines[0], lines[1], lines[4], lines[-1]) == ({"a": "é"}, [1], 2, 2)
    with pytest.raises(BadSample, match="not JSON: Expecting property name"):
        lines[2]
    with pytest.raises(BadSample, match="line of 13 bytes; at most 12"):
        lines[3]
    with pytest.raises(IndexError):
        lines[5]


def test_parquet_rows_are_read_a_row_group_at_a_time(tmp_path, monkeypatch):
    table = pa.table({"id": list(range(5)), "image": [{"bytes": b"x", "path": None}] * 5})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    rows = pickle.loads(pickle.dumps(ParquetRows(tmp_path / "x.parquet")))
    asked = []
    monkeypatch.setattr(records, "parquet_rows", lambda *a, **k: asked.append(k) or files.parquet_rows(*a, **k))
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["image"] == {"bytes": b"x", "path": None}
    assert asked == [{"groups": [0]}, {"groups": [1]}, {"groups": [2]}]
    assert describe_record(rows, 3) == "record 3"


def test_all_kinds_of_files_hold_the_same_records(tmp_path):
    rows = [{"a": 'b, "c"\nd'}, {"a": "e\u2028f"}]  # U+2028 ends a line for str.splitlines, but not in these files
    (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["a"], *(row.values() for row in rows)])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for kind in ("json", "jsonl", "csv", "parquet"):
        assert list(read_records(tmp_path / f"x.{kind}")) == rows, kind


def test_files_without_records_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.csv").write_bytes(b"\xff")
    for name, reason in {
        "x.json": "rows: .*x.json holds a dict; expected a list of records",
        "x.csv": "rows: .*x.csv is not CSV",
        "x.txt": "rows: .*x.txt; allowed: .json, .jsonl, .ndjson, .csv, .tsv, .parquet",
        "y.jsonl": "rows: .*y.jsonl: No such file",
        "y.csv": "rows: .*y.csv: No such file",
        "y.parquet": "y.parquet: not a readable parquet file",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_records(tmp_path / name, "rows")


def test_rows_of_csv_and_tsv_have_lines_and_whole_texts(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1,"x\ny"\n2,p, q\n3\n')
    rows = pickle.loads(pickle.dumps(read_records(tmp_path / "x.csv")))
    assert (rows[0], rows[2]) == ({"a": "1", "b": "x\ny"}, {"a": "3", "b": None})
    assert [describe_record(rows, i) for i in range(3)] == ["line 3", "line 4", "line 5"]
    with pytest.raises(BadSample, match="has 3 values, the header names 2; are its texts in quotes"):
        rows[1]
    (tmp_path / "x.tsv").write_text("a\tb\n1\tx, y\n")
    assert list(read_records(tmp_path / "x.tsv")) == [{"a": "1", "b": "x, y"}]


def test_quotes_that_do_not_match_swallow_no_rows(tmp_path):
    (tmp_path / "x.tsv").write_text('a\tb\n1\tx\n2\t"y\n3\t"z\n')
    with pytest.raises(DataError, match="x.tsv is not TSV: after line 2: "):
        read_records(tmp_path / "x.tsv")
