"""The largest micro-batches run first, and leave no trace in what is trained afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import STRATEGIES
from tests.training.test_fit import assert_same_end, stop_after
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import run_id
from vlm_train.data.order.mixture import SampleRef
from vlm_train.errors import TrainingError
from vlm_train.training.callbacks.largest_first import Place, find_largest
from vlm_train.training.module import VLMModule

LARGEST = "trainer.largest_first=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), text_only=True)


def job(data: Path, runs: Path, *more: str, name: str = "run") -> list[str]:
    draw = f"+callbacks.draw={{_target_: tests.support.audit.Draw, path: {runs / name}-draws}}"
    own = ["allow_targets=[tests.]", "trainer.export=false", draw, f"data.cache={runs / 'lengths'}", *more]
    return command(data, runs, *own, name=name)


def test_the_largest_are_found_on_any_rank() -> None:
    tokens, patches = np.array([5, 9, 2, 7]), np.array([4, 0, 64, 4])
    steps = [[[[0], [2]], [[0]]], [[[3, 0], [2]], [[1]]]]  # step -> rank -> rows of one micro-batch

    def step(number: int, rank: int) -> Any:
        rows = [tuple(SampleRef(index, 0) for index in row) for row in steps[number][rank]]
        return [rows, []]

    plan: Any = SimpleNamespace(world=2, step=step)
    found, looked = find_largest(plan, tokens, patches, 0, 2)
    assert looked == 2 and found == [Place(1, 0, 24, 72)]  # rows of 12 and 2 tokens, as long as the longer one
    assert find_largest(plan, tokens, patches, 0, 1)[0] == [Place(0, 0, 10, 68)]
    steps[0][1] = [[1, 1]]
    assert find_largest(plan, tokens, patches, 0, 1)[0] == [Place(0, 0, 18, 0), Place(0, 0, 10, 68)]


def test_it_leaves_no_trace(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    step = VLMModule.training_step

    def training_step(self: VLMModule, batch: Any, batch_idx: int) -> Any:
        seen.append((batch.window.step, batch.text["llm"].ids.numel()))
        torch.rand(1), np.random.rand(), random.random()  # as dropout and others' code do
        return step(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)
    one = train(job(data, tmp_path, LARGEST, name="one"))
    said = capsys.readouterr().out
    first = said.split("first step:")[0].splitlines()
    assert any(line.startswith("largest first: the largest micro-batches fit: ") for line in first)
    rehearsed, trained = seen[: len(seen) - 12], seen[len(seen) - 12 :]  # 6 steps of 2 micro-batches
    assert rehearsed and max(n for _, n in rehearsed) == max(n for _, n in trained)
    other = train(job(data, tmp_path, name="other"))
    assert "largest first" not in capsys.readouterr().out
    assert_same_end(one, other)
    assert (tmp_path / "one-draws-0").read_text() == (tmp_path / "other-draws-0").read_text()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 5)
        train(job(data, tmp_path, name="resumed"))
    assert_same_end(train(job(data, tmp_path, LARGEST, name="resumed")), other)


def test_it_names_no_other_run(data: Path, tmp_path: Path) -> None:
    plain = [one for one in command(data, tmp_path) if not one.startswith("run_name")]
    assert run_id(compose_config([*plain, LARGEST])) == run_id(compose_config(plain))


def test_what_does_not_fit_shows_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: VLMModule, batch: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(VLMModule, "forward", forward)
    with pytest.raises(TrainingError, match=r"largest_first: the micro-batch \d of step \d does not fit .*20\.00 GiB"):
        train(job(data, tmp_path, LARGEST))
    assert not (tmp_path / "run/metrics.jsonl").read_text() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_keeps_a_trace(strategy: str, data: Path, tmp_path: Path) -> None:
    common = [*STRATEGIES[strategy], "batch.micro=1", "params=all", "trainer.max_steps=3"]
    jobs = [job(data, tmp_path, *common, *more, name=n) for n, more in (("one", [LARGEST]), ("other", []))]
    train_on_ranks(*jobs)
    one, other = (load_file(tmp_path / n / "checkpoints/step-00000003/weights.safetensors") for n in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
