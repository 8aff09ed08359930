"""Files that are whole whenever they are there."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from data_pipelines.atomic_write import atomic_write


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("naïve")
        file.flush()
        assert path.read_text() == "old"
        (partial,) = tmp_path.glob(".*")
        assert partial.name.startswith(".run.json.") and partial.name.endswith(f"-{os.getpid()}.partial")
    assert path.read_bytes() == "naïve".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_and_line_ends_are_written_as_given(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a", "wb") as file:
        file.write(b"\r\n\xff")
    with atomic_write(tmp_path / "b", newline="") as file:
        file.write("\r\n")
    assert (tmp_path / "a").read_bytes() == b"\r\n\xff" and (tmp_path / "b").read_bytes() == b"\r\n"


@pytest.mark.parametrize("sync", [False, True])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(sync: bool, tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the system writes what fits and refuses the rest."""
    path = tmp_path / "run.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError), atomic_write(path, sync=sync) as file:
            file.write("x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_any_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "new") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_synced_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), rename(*names)))
    for sync, expected in ((False, ["replace"]), (True, ["fsync", "replace"])):
        order.clear()
        with atomic_write(tmp_path / "file", sync=sync) as file:
            file.write("text")
        assert order == expected
