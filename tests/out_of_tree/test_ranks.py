"""The native tower and the mixture on two ranks: the run of one process, under DDP, ZeRO-2, ZeRO-3 and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.out_of_tree.command_line import HERE, SEARCH, assert_equal_weights, small_run, start
from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data
from tests.training.strategies.test_parity import STRATEGIES

SGD = ["optim=sgd", "~optim.betas", "optim.lr=0.05", "trainer.export=false"]
PIECES = {"native": ["params=all"], "mixture": []}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("piece", PIECES)
def test_two_ranks_compute_what_one_process_does(piece: str, tmp_path: Path) -> None:
    """Every second sample has no picture, so that a rank has a micro-batch without any."""
    data = make_data(tmp_path / "data", text_only=True)
    own = [*PIECES[piece], *SGD, "batch.micro=1"]
    assert start(small_run(piece, data, tmp_path, *own, name="one")) == 0
    names = ("ddp", "zero2", "zero3", "fsdp2")
    jobs = [small_run(piece, data, tmp_path, *own, *STRATEGIES[name], SEARCH, name=name) for name in names]
    train_on_ranks(*jobs, packages=[HERE], limit=600)
    for name in names:
        assert_equal_weights(tmp_path / "one", tmp_path / name)
