"""run.json: tolerant reading, whole writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.runs import record
from vlm_train.runs.rollback import read_rollbacks


def test_a_missing_or_corrupt_record_reads_as_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert record.read_record(tmp_path) == {} and not caplog.records
    for content in ("", "{", "[1]", "\x00", "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        caplog.clear()
        assert record.read_record(tmp_path) == {}
        assert str(tmp_path / "run.json") in caplog.text


def test_values_of_a_wrong_type_count_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text('{"status": ["done"], "step": "7", "metrics": 5, "run_id": "x"}')
    assert record.read_record(tmp_path) == {"run_id": "x"}
    assert "status is ignored: expected str" in caplog.text and "metrics is ignored: expected dict" in caplog.text


GOOD = b'{"step": 1, "time": 1.0, "split": "train", "loss": 2.0}\n'


@pytest.mark.parametrize(
    "damaged",
    [b"5\n", b"[]\n", b"{}\n", b'{"step": "x", "split": "train"}\n', b'{"step": true, "split": "train"}\n']
    + [b'{"step": 1}\n', b"\xff\xfe\n", GOOD[:20] + b"\n", b"\0" * 99 + b"\n", b"[" * 100_000 + b"\n"],
)
def test_lines_of_metrics_that_are_none_are_left_out(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + damaged + GOOD.replace(b'"step": 1', b'"step": 9'))
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 9]
    assert record.last_loss(tmp_path, "train")["step"] == 9
    record.keep_metrics(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD


@pytest.mark.parametrize("content", ["", "{", '{"made": 5}', '{"made": [{"to": "x"}]}', "[" * 100_000])
def test_damaged_rollbacks_are_named(content: str, tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    (tmp_path / "rollbacks.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: is damaged"):
        read_rollbacks(tmp_path)


def test_update_keeps_the_other_keys_and_leaves_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    record.update_record(folder, status="running", step=1)
    record.update_record(folder, status="done")
    assert record.read_record(folder) == {"status": "done", "step": 1}
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    record.update_record(tmp_path, step=1)
    with pytest.raises(TypeError):
        record.update_record(tmp_path, step=object())
    assert record.read_record(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="forks are Unix's")
def test_a_killed_process_lets_go_of_its_run_though_its_children_live_on(tmp_path: Path) -> None:
    held = """
import os, sys, time
from pathlib import Path
from vlm_train.runs import record
with record.lock_folder(Path(sys.argv[1])):
    read, write = os.pipe()
    if not os.fork():
        os.write(write, b"x")  # only now has the child closed what it inherited
        time.sleep(60)
    os.read(read, 1)
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="is being trained by another process"), record.lock_folder(tmp_path):
            pass
        process.kill()
        process.wait()
        with record.lock_folder(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
