"""A run that stands still ends, and says where; one that is slow for a reason goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import ranks
from tests.support.faults import OVERRIDES
from tests.support.small_run import command, make_data
from vlm_train.training.callbacks import watchdog
from vlm_train.training.callbacks.watchdog import EVALUATION, FIRST, Watchdog, begin_phase


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def dog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """A watchdog of 20 looks, whose thread does not run; `look` does its work."""
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(Ended(code)))
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    dog = Watchdog(tmp_path, minutes=1)
    dog.trainer = SimpleNamespace(global_rank=3, global_step=7, callbacks=[dog])  # type: ignore[assignment]
    return dog


def look(dog: Watchdog, times: int) -> None:
    class Looks(threading.Event):
        left = times

        def wait(self, timeout: float | None = None) -> bool:
            self.left -= 1
            return self.left < 0

    dog._watch_progress(Looks())


def looks_until_end(dog: Watchdog) -> int:
    for count in range(1, 1000):
        try:
            look(dog, 1)
        except Ended as ended:
            assert ended.args == (1,)
            return count
    return 0


def test_what_stands_still_ends_with_its_stacks(dog: Watchdog, tmp_path: Path, capfd: Any) -> None:
    dog.on_train_batch_end()
    dog.on_train_batch_start()
    assert looks_until_end(dog) == 21
    stacks = (tmp_path / "stacks-3.txt").read_text()
    assert stacks.startswith("Rank 3 has stood still for 1.05 minutes (trainer.watchdog_minutes) after step 7, phase: ")
    assert "phase: forward and backward." in stacks and "test_what_stands_still" in stacks
    said = capfd.readouterr().err
    assert "Rank 3 has stood still" in said.splitlines()[-1] and "test_what_stands_still" in said


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_end",
    ],
)
def test_whatever_is_finished_counts(dog: Watchdog, hook: str) -> None:
    dog.on_train_batch_end()
    look(dog, 15)
    getattr(dog, hook)()
    assert looks_until_end(dog) == 21


def test_the_first_step_may_take_longer(dog: Watchdog) -> None:
    dog.begin_phase("start")
    dog.on_train_batch_start()
    assert looks_until_end(dog) == 20 * FIRST + 1


def test_an_evaluation_may_last_also_for_those_that_wait_for_it(dog: Watchdog) -> None:
    dog.on_train_batch_end()
    begin_phase(dog.trainer, EVALUATION)  # type: ignore[arg-type]
    assert looks_until_end(dog) == 0
    dog.on_train_batch_start()  # a rank that does not evaluate waits within its next step
    assert looks_until_end(dog) == 0
    dog.on_train_batch_end()
    assert looks_until_end(dog) == 21


def test_off(tmp_path: Path) -> None:
    before = threading.active_count()
    Watchdog(tmp_path, minutes=None).setup(SimpleNamespace(global_rank=0), None, "fit")  # type: ignore[arg-type]
    assert threading.active_count() == before


@pytest.mark.timeout(150)
def test_a_hang_on_one_rank_ends_both(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    overrides = command(data, tmp_path, "batch.micro=1", "trainer.watchdog_minutes=0.1", *OVERRIDES)
    ended = ranks.run(overrides, tmp_path / "out", fault="hang 1 3")
    assert ended.codes == [1, 1], ended.output
    stacks = [(tmp_path / "run" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert "sleeping_beauty" in stacks[1] and "after step 3, phase: forward and backward" in stacks[1]
    assert "sleeping_beauty" not in stacks[0] and "after step 3" in stacks[0]
    assert "Rank 1 has stood still" in ended.output
    assert (tmp_path / "run" / "checkpoints" / "LATEST").read_text() == "step-00000002\n"
