"""Learning-rate schedules, step by step."""

from __future__ import annotations

import pytest
import torch

from vlm_train.training.optim import epoch_decay


def rates(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = epoch_decay(optimizer, total_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_rate_falls_from_one_pass_to_the_next() -> None:
    found = rates(12, epochs=3, factor=0.5, warmup_steps=2, min_ratio=0.3)
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6, 0.6])


def test_without_passes_it_stays() -> None:
    assert rates(3, epochs=None, factor=0.5) == [2.0] * 3
