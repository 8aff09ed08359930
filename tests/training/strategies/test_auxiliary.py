"""A family of somebody's own with router logits learns its balance under sharded strategies as under DDP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data
from tests.training.strategies.test_parity import SGD, STRATEGIES, assert_equal_runs, log

ROUTED = [
    "model._target_=tests.contracts.preference.Routed", "allow_targets=[tests.]", "params=all", "batch.micro=1",
    "+objective.balance={_target_: tests.contracts.preference.Balance, weight: 0.5}", "trainer.export=false",
    "trainer.activation_checkpointing=full", "trainer.max_steps=3",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_router_logits_reach_their_loss_under_every_strategy(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    names = ("ddp", "zero2", "fsdp2")
    train_on_ranks(*(command(data, tmp_path, *STRATEGIES[name], *ROUTED, *SGD, name=name) for name in names), limit=500)
    row = next(row for row in log(tmp_path / "ddp") if row["split"] == "train")
    assert 0.5 < row["balance_loss"] < 1 and row["lm_loss"] > 0
    for name in names[1:]:
        assert_equal_runs(tmp_path / "ddp", tmp_path / name)
