"""The bar over all steps of a training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_train.training.callbacks.progress import ProgressBar


@pytest.mark.parametrize("ending", ["on_train_end", "on_exception"])
def test_a_resumed_bar_counts_the_steps_before(ending: str) -> None:
    bar, trainer = ProgressBar(10), SimpleNamespace(is_global_zero=True, global_step=4)
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert bar.bar is not None
    (task,) = bar.bar.tasks
    assert (task.completed, task.total) == (4, 10)
    trainer.global_step = 5
    bar.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert task.completed == 5 and bar.bar.live.is_started
    shown: Any = bar.bar
    getattr(bar, ending)(*[trainer, None, ValueError()][: 2 if ending == "on_train_end" else 3])
    assert bar.bar is None and not shown.live.is_started


def test_other_ranks_draw_none() -> None:
    bar = ProgressBar(10)
    bar.on_train_start(SimpleNamespace(is_global_zero=False, global_step=0), None)  # type: ignore[arg-type]
    bar.on_train_batch_end(SimpleNamespace(global_step=1), None, None, None, 0)  # type: ignore[arg-type]
    assert bar.bar is None
