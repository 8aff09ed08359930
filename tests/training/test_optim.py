"""Learning-rate schedules, step by step."""

from __future__ import annotations

import pytest
import torch

from vlm_train.training.optim import cosine, epoch_decay


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


def ratios(total: int, *steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine(optimizer, total_steps=total, **settings)
    return [schedule.lr_lambdas[0](step) for step in steps]


def test_a_cosine_may_count_the_warm_up() -> None:
    """minigpt4/common/optims.py: 9.707e-5 of 1e-4 at step 5,000 of 20,000, down to 8e-5."""
    counted = ratios(20_000, 5000, 20_000, warmup_steps=5000, min_ratio=0.8, warmup_counts=True)
    assert counted == pytest.approx([0.9707107, 0.8])
    assert ratios(20_000, 5000, 20_000, warmup_steps=5000, min_ratio=0.8) == pytest.approx([1.0, 0.8])


def test_a_warm_up_may_start_above_0() -> None:
    assert ratios(100, 0, 5, 10, 100, warmup_steps=10, start_ratio=0.01) == pytest.approx([0.01, 0.505, 1.0, 0.0])
    assert ratios(100, 0, 5, 10, 100, warmup_steps=10) == pytest.approx([0.0, 0.5, 1.0, 0.0])
