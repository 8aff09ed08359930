"""DPO and MPO in whole runs: cut, packed and spread the same; the reference is frozen, live or from columns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import ADAMW, SGD, STRATEGIES, assert_equal_runs
from vlm_train import cli
from vlm_train.training import reference as reference_module

COMMON = ["data.rejected=true", "reference.model=start", "trainer.export=false", "trainer.log_every=1"]
LAST = "checkpoints/step-00000006/weights.safetensors"
ADAPTERS = ["peft=lora", "params.rules=[{match: '.*lora_.*', lr: 0.01}, {match: '.*', lr: null}]", "optim.lr=0.01"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("preferences"), rejected=True)


def job(objective: str, data: Path, runs: Path, name: str, *more: str) -> list[str]:
    own = [f"objective={objective}", *COMMON, "params=all", f"data.cache={runs}/lengths"]
    return command(data, runs, *own, *more, name=name)


def lines(run: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("whole")
    return {name: train(job(name, data, runs, name, *SGD, "batch.micro=4")) for name in ("dpo", "mpo")}


def test_the_margin_grows_and_is_logged_under_trls_names(whole: dict[str, Path]) -> None:
    rows = lines(whole["dpo"])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "the reference is the model at first"
    assert rows[0]["sigmoid_rewards_margins"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["sigmoid_rewards_margins"] > 0
    for row in rows:
        margin = row["sigmoid_rewards_chosen"] - row["sigmoid_rewards_rejected"]
        assert row["sigmoid_rewards_margins"] == pytest.approx(margin, abs=1e-5)
        assert 0 <= row["sigmoid_rewards_accuracies"] <= 1 and row["sigmoid_logps_chosen"] < 0


def test_mpo_is_its_three_losses(whole: dict[str, Path]) -> None:
    for row in lines(whole["mpo"]):
        added = 0.8 * row["sigmoid_loss"] + 0.2 * row["bco_pair_loss"] + row["sft_loss"]
        assert row["loss"] == pytest.approx(added, rel=1e-5)
    assert lines(whole["mpo"])[0]["bco_pair_loss"] == pytest.approx(2 * math.log(2), abs=1e-4)


@pytest.mark.parametrize("cut", [["batch.micro=1"], ["batch.micro=4", "data.pack=256"]], ids=["micro", "packed"])
@pytest.mark.parametrize("objective", ["dpo", "mpo"])
def test_a_step_is_the_same_however_it_is_cut(
    objective: str, cut: list[str], data: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    assert_equal_runs(whole[objective], train(job(objective, data, tmp_path, "cut", *SGD, *cut)))


def test_the_reference_never_changes_and_is_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    lend = reference_module.lend

    def keep(cfg: Any, model: Any, reference: Any) -> Any:
        kept.append((model, reference, {name: tensor.clone() for name, tensor in reference.state_dict().items()}))
        return lend(cfg, model, reference)

    monkeypatch.setattr(reference_module, "lend", keep)
    run = train(job("mpo", data, tmp_path, "run", *ADAMW, "batch.micro=2", "optim.weight_decay=0.1"))
    ((model, reference, before),) = kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    assert not reference.training and not any(p.requires_grad or p.grad is not None for p in reference.parameters())
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(before) // 2
    with safe_open(run / LAST, "pt") as file:
        assert not any("reference" in name for name in file.keys())  # noqa: SIM118
        assert len(list(file.keys())) <= len(before)  # noqa: SIM118


def test_adapters_are_their_own_reference(data: Path, tmp_path: Path) -> None:
    """LoRA: the model with its adapters off, without a second copy, gives what a second copy gives."""
    off = train(job("mpo", data, tmp_path, "off", "batch.micro=2", *ADAPTERS))
    assert lines(off)[0]["sigmoid_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines(off)[-1]["sigmoid_loss"] < lines(off)[0]["sigmoid_loss"]
    copied = train(job("mpo", data, tmp_path, "copied", "batch.micro=2", *ADAPTERS, "reference.init_from=[]"))
    assert_equal_runs(off, copied)


def score(run: Path, data: Path, *more: str) -> list[str]:
    """Write the log-likelihoods of both splits; the overrides of a run that reads them."""
    for split in ("train", "val"):
        scored = ["mode=score", "columns.scores=answers", f"columns.shards={data}/tiny/{split}", "columns.batch=3"]
        assert cli.main([*scored, f"run={run}", *more]) == 0
    entries = [f"+data.{split}.0.columns={data}/tiny/{split}.columns/answers" for split in ("train", "val")]
    return [*entries, "reference.model=null", "objective.dpo.reference_columns=[chosen_logp,rejected_logp]"]


def test_columns_stand_for_a_live_reference(data: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    """A DPO run of a trained teacher, whose likelihoods are computed live, or before by `mode=score`."""
    data = make_data(tmp_path / "data", rejected=True)
    settings = [*SGD, "batch.micro=4", "trainer.val_every=3", "objective.dpo.gamma=2"]
    live = train(job("mpo", data, tmp_path, "live", *settings, f"reference.model={whole['dpo']}"))
    columns = score(whole["dpo"], data, "columns.gamma=2")
    read = train(job("mpo", data, tmp_path, "read", *settings, *columns))
    for split in ("train", "val"):
        for row, same in zip(lines(live, split), lines(read, split), strict=True):
            for name in (key for key in row if key.endswith("loss") or "_rewards_" in key):
                assert same[name] == pytest.approx(row[name], rel=1e-6, abs=1e-6), name
    weights, others = (load_file(run / LAST) for run in (live, read))
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= 1e-6 * tensor.abs().max() + 1e-9, name
    assert lines(live)[0]["sigmoid_loss"] != pytest.approx(math.log(2), abs=1e-4)  # the teacher has learned


def test_columns_of_other_settings_are_refused(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", rejected=True)
    columns = score(whole["dpo"], data)
    run = job("dpo", data, tmp_path, "run", "batch.micro=4", *columns)
    assert cli.main([*run, "dry_run=true"]) == 0
    for setting, said in (
        ("objective.dpo.gamma=1", "columns.gamma (None)"),
        ("data.max_length=40", "data.max_length (512)"),
        ("template=chatml", "template"),
        ("image=pad", "image"),
    ):
        assert cli.main([*run, setting]) == 2
        error = capsys.readouterr().err
        assert f"data.train.0.columns: {data}/tiny/train.columns/answers was computed with another {said}." in error
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "batch.normalize=sample",
            "batch.normalize: sample scales the weights that objective.dpo sums. Allowed: token.",
        ),
        ("+data.train.0.loss_weight=2", "data.train.0.loss_weight: 2 scales the weights that objective.dpo sums."),
        ("data.rejected=false", "objective.dpo: reads the stream 'rejected'."),
        ("reference.model=null", "objective.dpo: compares with a reference model. Use reference.model=start"),
        ("objective.dpo.beta=0", "objective.dpo.beta: got 0; allowed: above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    setting: str, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*job("dpo", data, tmp_path, "run"), setting]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_answers_have_no_captions(whole: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = ["mode=score", f"run={whole['dpo']}", f"columns.shards={data}/tiny/train"]
    assert cli.main([*scored, "columns.scores=answers", "columns.captions=x"]) == 2
    assert "columns.scores=answers scores no captions" in capsys.readouterr().err
    assert cli.main([*scored, "columns.scores=answer"]) == 2
    assert "columns.scores: got 'answer'. Did you mean" in capsys.readouterr().err
    assert cli.main([*scored, "columns.scores=answers", "columns.gamma=0"]) == 2
    assert "columns.gamma: expected a number > 0, got 0" in capsys.readouterr().err


@pytest.fixture(scope="session")
def ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("ddp")
    train_on_ranks(*spread("ddp", data, runs))
    return runs


def spread(strategy: str, data: Path, runs: Path) -> list[list[str]]:
    """A run of one pair a micro-batch, and a packed one with several head calls."""
    plain, packed = (job("mpo", data, runs, name, *STRATEGIES[strategy], *SGD, "batch.micro=1") for name in ("a", "b"))
    return [plain, [*packed, "data.pack=256", "objective.dpo.chunk=8"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_process_does(ddp: Path, whole: dict[str, Path]) -> None:
    for name in ("a", "b"):
        assert_equal_runs(whole["mpo"], ddp / name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_strategy_computes_what_ddp_does(strategy: str, data: Path, ddp: Path, tmp_path: Path) -> None:
    train_on_ranks(*spread(strategy, data, tmp_path))
    for name in ("a", "b"):
        assert_equal_runs(ddp / name, tmp_path / name)
