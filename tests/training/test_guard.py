"""Steps whose gradients are no numbers make no update, on any rank, under any strategy; the rest goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import STRATEGIES, log
from vlm_train import cli
from vlm_train.errors import TrainingError
from vlm_train.runs import record
from vlm_train.runs.rollback import Rollback, is_stale
from vlm_train.training.guard import SCALE, SEARCH, Guard
from vlm_train.training.metrics import all_finite
from vlm_train.training.module import VLMModule

POISON = "+callbacks.poison={{_target_: tests.support.audit.Poison, steps: {}, rank: {}}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def job(data: Path, runs: Path, *more: str, name: str = "run") -> list[str]:
    own = ["allow_targets=[tests.]", "trainer.export=false", "batch.micro=1", *more]
    return command(data, runs, *own, name=name)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/weights.safetensors")


def skipped(run: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"skipped-steps-{rank}.jsonl").read_text().splitlines()]


def assert_step_3_was_left_out(run: Path) -> None:
    before, after, later = (weights(run, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], later[name]) for name in before)
    rows = {row["step"]: row for row in log(run) if row["split"] == "train"}
    assert rows[3]["skipped_steps"] >= 1 and "loss" not in rows[3] and "skipped_steps" not in rows[4]
    assert all(rows[step]["loss"] < 10 for step in (1, 2, 4, 5, 6))
    rates = [rows[step]["lr/llm"] for step in (2, 3)]
    assert rates[0] == rates[1]  # the schedule follows updates


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s == "zero2" else pytest.mark.slow) for s in STRATEGIES]
)
def test_a_step_that_is_poisoned_on_one_rank_makes_no_update(strategy: str, data: Path, tmp_path: Path) -> None:
    train_on_ranks(job(data, tmp_path, *STRATEGIES[strategy], POISON.format([3], 1), "trainer.save_every=1"))
    assert_step_3_was_left_out(tmp_path / "run")
    for rank in (0, 1):
        (line,) = skipped(tmp_path / "run", rank)
        assert line["step"] == 3 and len(line["samples"]) == 2
    state = torch.load(tmp_path / "run/checkpoints/step-00000006/state.ckpt", weights_only=True)
    norms = state["since_log"]["guard"]["norms"]
    assert len(norms) == 5 and min(norms) > 0.1  # asked once a step, for the gradients of all ranks


def test_too_many_in_a_row_stop_the_run(data: Path, tmp_path: Path) -> None:
    more = [POISON.format([3, 4, 5], 0), "trainer.guard.max_in_a_row=2"]
    with pytest.raises(TrainingError, match=r"3 steps in a row.*trainer.skip_steps=\[\[3,5\]\]"):
        train(job(data, tmp_path, *more))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]
    train(job(data, tmp_path, "trainer.skip_steps=[[3,5]]"))  # from step 4 on, whose update was not made either
    assert all(torch.equal(a, b) for a, b in zip(*(weights(tmp_path / "run", s).values() for s in (2, 4)), strict=True))
    assert not torch.equal(*(weights(tmp_path / "run", s)["connector.layers.0.weight"] for s in (4, 6)))


def test_a_run_goes_back_and_leaves_out_what_led_to_the_failure(data: Path, tmp_path: Path) -> None:
    poison = [POISON.format([4, 5, 6], 0), "trainer.guard.max_in_a_row=2", "trainer.max_steps=8"]
    went_back = job(data, tmp_path, *poison, "trainer.guard.rollback=1", "trainer.save_every=2", name="back")
    assert cli.main(went_back) == 0
    assert record.read_json(tmp_path / "back/rollbacks.json") == {"made": [{"to": 2, "last": 6}]}
    assert "rollback 1 of 1: continues from step 2, without the data of steps 3 to 6" in (
        tmp_path / "back/output.log"
    ).read_text(encoding="utf-8")
    by_hand = train(job(data, tmp_path, "trainer.max_steps=8", "trainer.skip_steps=[[3,6]]", name="by_hand"))
    for step in (2, 4, 8):
        ours, theirs = weights(tmp_path / "back", step), weights(by_hand, step)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in log(tmp_path / "back") if row["split"] == "train"] == list(range(1, 9))
    assert record.read_record(tmp_path / "back")["status"] == "done"


@pytest.mark.slow
def test_both_processes_go_back(data: Path, tmp_path: Path) -> None:
    poison = [POISON.format([4, 5], 1), "trainer.guard={max_in_a_row: 1, rollback: 1}", "launch.devices=2"]
    assert cli.main(job(data, tmp_path, *poison, *STRATEGIES["ddp"])) == 0
    assert record.read_json(tmp_path / "run/rollbacks.json") == {"made": [{"to": 2, "last": 5}]}
    before, after = (weights(tmp_path / "run", step) for step in (2, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record.read_record(tmp_path / "run")["status"] == "done"


@pytest.mark.slow
def test_a_run_that_goes_back_is_resumed_however_it_was_started(data: Path, tmp_path: Path) -> None:
    poison = [POISON.format([3, 4], 0), "trainer.guard={max_in_a_row: 1, rollback: 1}", "trainer.max_steps=5"]
    for resume in ("never", "restart"):
        assert cli.main(job(data, tmp_path, *poison, f"resume={resume}", name=resume)) == 0, resume
        assert record.read_json(tmp_path / resume / "rollbacks.json") == {"made": [{"to": 2, "last": 4}]}
        assert record.read_record(tmp_path / resume)["status"] == "done"


@pytest.mark.slow
def test_a_run_goes_back_only_so_often(data: Path, tmp_path: Path) -> None:
    poison = [POISON.format([3, 4, 6, 7], 0), "trainer.guard={max_in_a_row: 1, rollback: 1}", "trainer.max_steps=8"]
    assert cli.main(job(data, tmp_path, *poison)) == 1
    assert record.read_json(tmp_path / "run/rollbacks.json") == {"made": [{"to": 2, "last": 4}]}
    assert record.read_record(tmp_path / "run")["status"] == "failed"


def test_without_an_earlier_checkpoint_there_is_nothing_to_go_back_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"skip_steps=\[\[5,5\]\]"):
        Guard(tmp_path, max_in_a_row=0, rollback=1).leave_out(5, "gradient norm nan", [], rank=0)
    assert "no checkpoint from before step 5" in capsys.readouterr().out
    assert not (tmp_path / "rollbacks.json").exists()


def test_a_checkpoint_that_was_taken_back_is_not_resumed() -> None:
    made = [Rollback(to=4, last=9), Rollback(to=12, last=15)]
    found = [
        (step, count)
        for step in (4, 6, 12, 14, 20)
        for count in (0, 1, 2)
        if is_stale({"step": step, "rollbacks": count}, made)
    ]
    assert found == [(6, 0), (12, 0), (14, 0), (14, 1), (20, 0), (20, 1)]


def test_a_spike_is_far_above_the_usual_norm(tmp_path: Path) -> None:
    guard = Guard(tmp_path, spike=6.0, window=5)
    for norm in (1.0, 50.0, 1.1, 0.9, 1.0):  # nothing is usual yet
        assert guard.reason_to_skip(norm) is None
    assert guard.reason_to_skip(1.3) is None
    assert "gradient norm 9, usual 1" in (guard.reason_to_skip(9.0) or "")
    again = Guard(tmp_path, spike=6.0, window=5)
    again.load_state(guard.export_state())
    assert again.reason_to_skip(9.0) and list(again.norms) == list(guard.norms)


def test_a_sick_part_of_a_weight_is_seen() -> None:
    """ZeRO-3 leaves parameters empty, beside the part that a rank holds."""
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    policy = SimpleNamespace(groups=[SimpleNamespace(parameters=[parameter])])
    sums = SimpleNamespace(train=SimpleNamespace(totals={}))
    module: Any = SimpleNamespace(policy=policy, meter=sums, over_ranks=dict, global_step=1)
    parameter.ds_tensor = torch.ones(3)
    VLMModule.require_healthy(module)
    parameter.ds_tensor[1] = float("inf")
    with pytest.raises(TrainingError, match="not finite at step 1"):
        VLMModule.require_healthy(module)


def test_a_sum_that_overflows_is_not_sick() -> None:
    huge = torch.full((4,), 3e38)
    assert not huge.sum().isfinite() and all_finite([huge, torch.ones(2)])
    assert not all_finite([huge, torch.tensor([1.0, float("nan")])])
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])


def test_a_record_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Guard(tmp_path / "gone").leave_out(7, "gradient norm nan", ["a", "b"], rank=0)
    said = capsys.readouterr().out
    assert "skipped-steps-0.jsonl: cannot be written" in said and '"samples": ["a", "b"]' in said


def test_a_loss_scale_is_looked_for_but_not_forever(tmp_path: Path) -> None:
    guard = Guard(tmp_path, scaled=True)
    inf = float("inf")
    assert [guard.reason_to_skip(inf) for _ in range(SEARCH + 1)] == [SCALE] * SEARCH + ["gradient norm inf"]
    assert guard.reason_to_skip(1.0) is None and guard.reason_to_skip(inf) == SCALE
    assert Guard(tmp_path).reason_to_skip(inf) == "gradient norm inf" and list(guard.norms) == [1.0]


def test_a_run_with_a_spike_goes_on(data: Path, tmp_path: Path) -> None:
    more = ["+callbacks.spike={_target_: tests.support.audit.Poison, steps: [5], rank: 0, factor: 1000.0}"]
    run = train(job(data, tmp_path, *more, "trainer.guard={spike: 8, window: 3}"))
    assert [line["step"] for line in skipped(run, 0)] == [5]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_speaks_and_each_keeps_its_record(rank: int, tmp_path: Path, capsys: Any) -> None:
    Guard(tmp_path).leave_out(3, "gradient norm nan", ["a"], rank)
    assert capsys.readouterr().out == ("step      3  no update: gradient norm nan\n" if rank == 0 else "")
    assert skipped(tmp_path, rank) == [{"step": 3, "reason": "gradient norm nan", "samples": ["a"]}]
