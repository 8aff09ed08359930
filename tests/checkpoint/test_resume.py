"""From what a run resumes, and that a manifest which was changed is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_train.checkpoint import files
from vlm_train.checkpoint.files import commit_checkpoint, verify_checkpoint, write_bytes, write_tensors
from vlm_train.checkpoint.resume import find_resume, newest_valid
from vlm_train.errors import CheckpointError


def save(run: Path, step: int, **more: object) -> Path:
    """A checkpoint of two files."""
    final = run / "checkpoints" / f"step-{step:08d}"
    files.begin_checkpoint(final)
    partial = files.partial_folder(final)
    written = {files.STATE: write_bytes(partial / files.STATE, b"state")}
    written[files.WEIGHTS] = write_tensors(partial / files.WEIGHTS, {"w": torch.ones(3)})
    facts = {"run_id": "r", "frozen": [], "data": "abc4", "metric": float("nan"), **more}
    commit_checkpoint(final, written, step, facts)
    return final


def change(folder: Path, old: str, new: str) -> None:
    path = folder / files.MANIFEST
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 4', '"step": 5'), ('"data": "abc4"', '"data": "abc5"'), ('"run_id": "r"', '"run_id": "s"')],
)
def test_a_changed_manifest_is_passed_over_for_the_one_before(old: str, new: str, tmp_path: Path, capsys) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    assert newest_valid(tmp_path / "checkpoints").step == 4  # type: ignore[union-attr]
    change(newest, old, new)
    assert newest_valid(tmp_path / "checkpoints").step == 2  # type: ignore[union-attr]
    assert f"skipping {newest}/manifest.json: its SHA-256 is not that in it" in capsys.readouterr().out


def test_a_manifest_without_files_verifies_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    data = json.loads((folder / files.MANIFEST).read_text())
    del data["sha256"]
    (folder / files.MANIFEST).write_text(json.dumps(data))
    assert verify_checkpoint(folder)["step"] == 2  # one of before manifests had a hash
    (folder / files.MANIFEST).write_text(json.dumps({**data, "files": {}}))
    with pytest.raises(CheckpointError, match="names no files"):
        verify_checkpoint(folder)
    (folder / files.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a manifest of ours"):
        verify_checkpoint(folder)


def test_a_run_is_no_checkpoint_and_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "auto", tmp_path / "other"
    folder = save(one, 2)
    assert find_resume(str(folder), other, "r").folder == folder  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="is a run; give one of its checkpoints"):
        find_resume(str(one), other, "r")
    monkeypatch.chdir(tmp_path)
    assert find_resume("auto", other, "r") is None  # a run of that name is not meant
    assert find_resume("auto", one, "r").step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["w", "we", "wei", "weig", "weigh", "weight", "weights", "weights1"])
def test_tensors_begin_at_a_multiple_of_eight_bytes(name: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {name: torch.arange(3.0)})
    data = (tmp_path / "w.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert torch.equal(load_file(tmp_path / "w.safetensors")[name], torch.arange(3.0))
