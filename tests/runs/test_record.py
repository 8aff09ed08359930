"""run.json: tolerant reading, whole writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_train.errors import ConfigError
from vlm_train.runs import record


def test_a_missing_or_corrupt_record_reads_as_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert record.read_record(tmp_path) == {} and not caplog.records
    for content in ("", "{", "[1]", "\x00"):
        (tmp_path / "run.json").write_text(content)
        caplog.clear()
        assert record.read_record(tmp_path) == {}
        assert str(tmp_path / "run.json") in caplog.text


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
