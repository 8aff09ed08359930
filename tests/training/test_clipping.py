"""A veto that is left to the device makes what one of the host makes, one step later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.small_run import make_data, train
from tests.training.test_guard import POISON, assert_step_3_was_left_out, job, log, skipped, weights
from vlm_train.errors import TrainingError
from vlm_train.training import clipping
from vlm_train.training.guard import Guard
from vlm_train.training.loss_sums import Sums

LATE = "trainer.guard.weights=false"
"""Else the host looks at the first steps at once."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU plays the GPU."""
    inner = clipping._device_can_veto

    def can_veto(optimizer: Any, strategy: Any, module: Any, step: int) -> bool:
        pretended = SimpleNamespace(root_device=torch.device("cuda"), device_can_veto=strategy.device_can_veto)
        return inner(optimizer, pretended, module, step)

    monkeypatch.setattr(clipping, "_device_can_veto", can_veto)


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose norms the host has read."""
    read: list[int] = []
    inner = clipping.LateVerdict.read_norm
    monkeypatch.setattr(clipping.LateVerdict, "read_norm", lambda self: (read.append(self.step), inner(self))[1])
    return read


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_poisoned_step_makes_no_update(
    log_every: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watch_reads(monkeypatch)
    more = [POISON.format([3], 0), f"trainer.log_every={log_every}", "trainer.max_grad_norm=0.5", LATE]
    train(job(data, tmp_path, *more, f"trainer.save_every={log_every}"))
    assert read == [2, 3, 4, 5, 6]  # the host looks at the first step itself
    (line,) = skipped(tmp_path / "run", 0)
    assert line["step"] == 3 and line["reason"] == "gradient norm nan" and len(line["samples"]) == 4
    if log_every == 1:
        assert_step_3_was_left_out(tmp_path / "run")


def test_late_and_at_once_give_the_same_run(data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Weights, rates and what the log counts, whether the host looks at once or one step late."""
    more = [POISON.format([3], 0), "trainer.log_every=4", "trainer.save_every=null", "trainer.max_grad_norm=0.5", LATE]
    train(job(data, tmp_path, *more, name="at_once"))
    request.getfixturevalue("on_device")
    train(job(data, tmp_path, *more, name="late"))
    at_once, late = (weights(tmp_path / name, 6) for name in ("at_once", "late"))
    assert all(torch.equal(at_once[name], late[name]) for name in at_once)
    for row, same in zip(log(tmp_path / "at_once"), log(tmp_path / "late"), strict=True):
        keys = {key for key in row if key.startswith(("loss", "lr", "skipped", "grad_norm", "supervised"))}
        assert {key: row[key] for key in keys} == pytest.approx({key: same[key] for key in keys}, rel=1e-6)


@pytest.mark.usefixtures("on_device")
def test_too_many_in_a_row_stop_the_run_one_step_later(data: Path, tmp_path: Path) -> None:
    more = [POISON.format([2, 3, 4], 0), "trainer.guard.max_in_a_row=2", "trainer.save_every=null", LATE]
    with pytest.raises(TrainingError, match=r"3 steps in a row.*the last, 4,.*trainer.skip_steps=\[\[2,4\]\]"):
        train(job(data, tmp_path, *more, "trainer.log_every=100"))


def test_the_host_looks_where_more_is_asked_than_numbers(tmp_path: Path) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cuda"), device_can_veto=True)
    fused, other = (torch.optim.AdamW([torch.ones(2, requires_grad=True)], fused=kind) for kind in (True, False))

    def asks(optimizer: Any, watch: Any = None, **guard: Any) -> bool:
        first_steps = SimpleNamespace(watch=watch)
        module = SimpleNamespace(guard=Guard(tmp_path, **guard), first_steps=first_steps)
        return clipping._device_can_veto(optimizer, strategy, module, 2)

    assert asks(fused)
    assert not asks(other)
    assert not asks(fused, spike=6.0)
    assert not asks(fused, scaled=True)
    assert not asks(fused, skip=[(1, 3)])
    assert not asks(fused, watch=object())


def test_a_window_of_vetoed_steps_has_no_loss() -> None:
    """Sums that the device has put back are no loss of 0."""
    sums, before = Sums({"lm": 1.0}), Sums({"lm": 1.0})
    sums.totals = {"lm/sum": torch.tensor(torch.nan), "lm/count": torch.tensor(4.0)}
    sums.put_back_where(torch.tensor(True), before)
    assert sums.compute_means(dict) == {}
    sums.totals = {"lm/sum": torch.tensor(6.0), "lm/count": torch.tensor(4.0)}
    before.totals = {"lm/sum": torch.tensor(1.0), "lm/count": torch.tensor(2.0)}
    sums.put_back_where(torch.tensor(False), before)
    assert sums.compute_means(dict) == {"loss": 1.5}
    sums.put_back_where(torch.tensor(True), before)
    assert sums.compute_means(dict) == {"loss": 0.5}
