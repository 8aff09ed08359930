"""Writing checkpoints: in the background, on a full disk, the best and the old ones kept."""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import faults
from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from vlm_train.checkpoint import files
from vlm_train.checkpoint.files import verify_checkpoint
from vlm_train.checkpoint.state import _Reader
from vlm_train.errors import CheckpointError, Interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_tensors_are_written_as_safetensors(tmp_path: Path) -> None:
    tensors = {
        "plain": torch.randn(3, 4),
        "single": torch.tensor(7.0),
        "turned": torch.randn(4, 3).T,
        "half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }
    path = tmp_path / "t.safetensors"
    said = files.write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert said == {"bytes": path.stat().st_size, "sha256": files.hash_file(path)}


def test_in_the_background_the_same_is_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = files.write_tensors
    during: list[str] = []

    def write(path: Path, tensors: Any) -> Any:
        time.sleep(0.3)  # training goes on meanwhile, and must not change what is written
        during.append(path.parent.name)
        return slow(path, tensors)

    one = train(command(data, tmp_path, name="sync"))
    monkeypatch.setattr(files, "write_tensors", write)
    other = train(command(data, tmp_path, "trainer.async_save=true", name="async"))
    assert len(during) == 6 and steps(one) == steps(other) == [2, 4, 6]
    for step in (2, 4, 6):
        folders = [run / f"checkpoints/step-{step:08d}" for run in (one, other)]
        for name in ("weights.safetensors", "optimizer-00000-of-00001.safetensors"):
            a, b = (load_file(folder / name) for folder in folders)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        verify_checkpoint(folders[1])


class FullDisk:
    """`write_tensors` that finds no space in some of its calls."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.number, self.inner = calls, 0, files.write_tensors

    def __call__(self, path: Path, tensors: Any) -> Any:
        self.number += 1
        if self.number in self.calls:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self.inner(path, tensors)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_is_borne_once(
    background: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "write_tensors", FullDisk(3))  # two files a checkpoint: the first of step 4
    run = train(command(data, tmp_path, f"trainer.async_save={background}"))
    said = capsys.readouterr().out
    assert "step-00000004: cannot be written" in said and "No space left" in said and "tries again" in said
    assert steps(run) == [2, 6]
    assert not list((run / "checkpoints").glob(".*"))  # nothing half written stays


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_disk_that_stays_full_stops_the_run(
    background: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "write_tensors", FullDisk(*range(3, 99)))
    with pytest.raises(CheckpointError, match="No space left.*make room, then the same command resumes"):
        train(command(data, tmp_path, f"trainer.async_save={background}"))
    assert steps(tmp_path / "run") == [2]
    monkeypatch.undo()
    assert steps(train(command(data, tmp_path))) == [2, 4, 6]


@pytest.mark.timeout(60)
def test_an_error_of_any_kind_in_the_background_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, tensors: Any) -> Any:
        raise KeyError("torch.float8_e4m3fn")

    monkeypatch.setattr(files, "write_tensors", broken)
    with pytest.raises(CheckpointError, match="cannot be written: .*float8"):
        train(command(data, tmp_path, "trainer.async_save=true"))


def test_a_last_save_is_tried_again_after_one_that_failed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes in the validation after which step 4 is saved, in vain."""
    monkeypatch.setattr(files, "write_tensors", FullDisk(3))
    stop = "+callbacks.stop={_target_: tests.support.audit.StopInValidation, step: 4}"
    with pytest.raises(Interrupted):
        train(command(data, tmp_path, "trainer.val_every=2", "allow_targets=[tests.]", stop))
    assert steps(tmp_path / "run") == [2, 4]


def test_too_little_space_is_seen_before_writing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_train.checkpoint import save

    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match="GiB needed, 0.00 GiB free"):
        train(command(data, tmp_path))
    assert steps(tmp_path / "run") == []


def test_old_checkpoints_go_but_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 4.0, 6: 6.0, 7: 7.0}
    for step, loss in losses.items():
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        manifest = {"run_id": "r", "step": step, "frozen": [], "files": {}, "metric": loss}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    files.prune_checkpoints(tmp_path, "step-00000007", keep_last=2, keep_best=2, keep_every=5, lower=True)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == [2, 4, 5, 6, 7]
    files.prune_checkpoints(tmp_path, "step-00000007", keep_last=1, keep_best=1, keep_every=None, lower=False)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == [7]


def test_a_metric_that_is_nan_costs_no_better_checkpoint(tmp_path: Path) -> None:
    for step, loss in {1: 0.5, 2: float("nan"), 3: 0.2, 4: 0.9}.items():
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        manifest = {"run_id": "r", "step": step, "frozen": [], "files": {}, "metric": loss}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    files.prune_checkpoints(tmp_path, "step-00000004", keep_last=1, keep_best=1, keep_every=None, lower=True)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == [3, 4]


def test_a_checkpoint_holds_what_learns_and_no_more(data: Path, tmp_path: Path) -> None:
    """Weights and two moments in fp32 of every learning parameter; names and counters are the rest."""
    run = train(command(data, tmp_path))
    folder = run / "checkpoints/step-00000006"
    learned = sum(t.nbytes for t in load_file(folder / "weights.safetensors").values())
    states = load_file(folder / "optimizer-00000-of-00001.safetensors")
    assert {key.split("|")[1] for key in states} == {"exp_avg", "exp_avg_sq", "step"}
    assert sum(t.nbytes for key, t in states.items() if "|step|" not in key) == 2 * learned
    assert json.loads((folder / "manifest.json").read_text())["frozen"]


def test_states_of_a_parameter_without_dimensions_do_not_stand_for_others(tmp_path: Path) -> None:
    states = {"a|exp_avg|0": torch.ones(4), "a|step|0": torch.tensor(3.0), "scale|exp_avg|0": torch.tensor(1.0)}
    files.write_tensors(tmp_path / files.optimizer_file(0, 1), states)
    files.write_tensors(tmp_path / files.WEIGHTS, {})
    with ExitStack() as stack:
        assert _Reader(tmp_path, stack).kinds == {"exp_avg": False, "step": True}


def test_a_foreign_piece_is_named(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / files.optimizer_file(0, 1), {"a|exp_avg|here": torch.ones(4)})
    with ExitStack() as stack, pytest.raises(CheckpointError, match=r"'a\|exp_avg\|here' is not a piece of ours"):
        _Reader(tmp_path, stack)


def test_a_run_that_fails_ends_the_save_under_way(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 is being written, slowly, when step 3 fails."""
    write = files.write_tensors

    def slow(*args: Any) -> Any:
        time.sleep(2.0)
        return write(*args)

    monkeypatch.setattr(files, "write_tensors", slow)
    monkeypatch.setenv("FAULT", "raise 0 3")
    with pytest.raises(ValueError, match="the original error"):
        train(command(data, tmp_path, "trainer.async_save=true", *faults.OVERRIDES))
    assert steps(tmp_path / "run") == [2]


DRAW = ["allow_targets=[tests.]", "+callbacks.draw={{_target_: tests.support.audit.Draw, path: {}}}"]
CUT = "+callbacks.stop={_target_: tests.support.audit.Stop, after: 4}"


def drawing(data: Path, folder: Path, name: str, *more: str) -> list[str]:
    """A run with a callback of the user's that draws from Python's, NumPy's and torch's generators."""
    return command(data, folder, DRAW[0], DRAW[1].format(folder / f"{name}.txt"), *more, name=name)


def assert_draws_go_on(folder: Path, rank: int) -> None:
    whole, cut = ((folder / f"{name}.txt-{rank}").read_text().splitlines() for name in ("whole", "cut"))
    assert len(set(whole)) == 6 and cut[4:] == whole[4:]


def test_draws_of_others_go_on_too(data: Path, tmp_path: Path) -> None:
    train(drawing(data, tmp_path, "whole"))
    with pytest.raises(Interrupted):
        train(drawing(data, tmp_path, "cut", CUT))
    torch.manual_seed(1)
    train(drawing(data, tmp_path, "cut"))
    assert_draws_go_on(tmp_path, 0)


def test_every_rank_goes_on_with_its_own_draws(data: Path, tmp_path: Path) -> None:
    train_on_ranks(*(drawing(data, tmp_path, *job) for job in (("cut", CUT), ("whole",), ("cut",))))
    for rank in (0, 1):
        assert_draws_go_on(tmp_path, rank)
