"""Every rank makes the same calls whatever its batch holds: one rank has pictures, the other none, at every step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.audit import drawn
from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import SGD, STRATEGIES, assert_equal_runs

WHO = {"tower trains": "params=all", "tower frozen": "params=connector_llm"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), text_only=True)


def job(data: Path, runs: Path, who: str, *more: str, micro: int) -> list[str]:
    own = [*SGD, WHO[who], "batch.samples=2", f"batch.micro={micro}", "data.shuffle=none", "trainer.max_steps=4"]
    own += ["trainer.export=false", "trainer.val_every=2", "allow_targets=[tests.]"]
    own += [f"+callbacks.audit={{_target_: tests.support.audit.Audit, folder: {runs}/{who.split()[1]}}}"]
    return command(data, runs, *own, *more, name=who.split()[1])


@pytest.fixture(scope="session")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one rank, whose batches hold both kinds."""
    runs = tmp_path_factory.mktemp("alone")
    for who in WHO:
        train(job(data, runs, who, micro=2))
    return runs


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s == "zero3" else pytest.mark.slow) for s in STRATEGIES]
)
def test_one_rank_has_text_only(strategy: str, data: Path, alone: Path, tmp_path: Path) -> None:
    train_on_ranks(*(job(data, tmp_path, who, *STRATEGIES[strategy], micro=1) for who in WHO))
    for who in WHO:
        name = who.split()[1]
        assert_equal_runs(alone / name, tmp_path / name)
        first, second = (drawn(tmp_path / name, rank) for rank in (0, 1))
        numbers = [[int(keys[0][0][-2:]) % 2 for keys in one.values()] for one in (first, second)]
        assert all(a != b for a, b in zip(*numbers, strict=True)), numbers  # one of them odd: without a picture


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s == "zero3" else pytest.mark.slow) for s in ("zero3", "fsdp2")]
)
def test_one_rank_has_longer_answers(strategy: str, tmp_path: Path) -> None:
    """The head runs on some positions at a time, and strategies that spread its weights gather them at every call."""
    data = make_data(tmp_path / "data")
    short = ["objective.lm.chunk=4", "params=all"]
    train(job(data, tmp_path / "alone", "tower trains", *short, micro=2))
    train_on_ranks(job(data, tmp_path, "tower trains", *short, *STRATEGIES[strategy], micro=1), limit=100)
    assert_equal_runs(tmp_path / "alone" / "trains", tmp_path / "trains")
