"""A run that is killed and started again ends as one that was not, bit for bit, under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data
from tests.training.strategies.test_parity import ADAMW, STRATEGIES

WAYS = {
    "plain": ["data.workers=0"],
    "plain-workers": ["data.workers=2"],
    "packed": ["data.workers=0", "data.pack=192"],
    "packed-workers": ["data.workers=2", "data.pack=192"],
}
AUDIT = "+callbacks.audit={{_target_: tests.support.audit.Audit, folder: {folder}, kill_at: {at}, victim: {rank}}}"
STOP = "+callbacks.stop={{_target_: tests.support.audit.Stop, after: {}}}"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def job(strategy: str, data: Path, runs: Path, way: str, name: str, *more: str) -> list[str]:
    """Six steps of four samples, a checkpoint every two; two micro-batches a rank and step."""
    own = [*STRATEGIES[strategy], *ADAMW, *WAYS[way], "batch.micro=1", "params=all", "trainer.export=false"]
    own += ["allow_targets=[tests.]", f"paths.data={data}", "trainer.max_grad_norm=0.5", f"data.cache={runs}/lengths"]
    return command(data, runs, *own, *more, name=name)


def killed(strategy: str, data: Path, runs: Path, way: str, name: str, *more: str, at: int = 3, rank: int = 1) -> None:
    """Train, and kill -9 a rank before step `at`."""
    audit = AUDIT.format(folder=runs / "audit", at=at, rank=rank)
    codes = train_on_ranks(job(strategy, data, runs, way, name, *more, audit), check=False)
    assert -9 in codes
    assert not (runs / name / "checkpoints" / "step-00000006").exists()


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("step", "split", "loss", "grad_norm")} for row in rows]


def assert_same_end(one: Path, other: Path) -> None:
    """Equal losses of every step, weights, optimizer states and schedule, bit for bit."""
    assert log(one) == log(other)
    folders = [run / "checkpoints/step-00000006" for run in (one, other)]
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    assert names[0] == names[1] and len(names[0]) > 1
    for name in names[0]:
        assert same(*(load_file(folder / name) for folder in folders)), name
    states = [torch.load(folder / "state.ckpt", weights_only=True) for folder in folders]
    assert same(*(state["lr_schedulers"][0] for state in states))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_ends_as_one_that_was_not(strategy: str, data: Path, tmp_path: Path) -> None:
    for way in WAYS:
        killed(strategy, data, tmp_path, way, f"{way}-killed")
    runs = [job(strategy, data, tmp_path, way, f"{way}-{which}") for way in WAYS for which in ("whole", "killed")]
    train_on_ranks(*runs, limit=500)
    for way in WAYS:
        assert_same_end(tmp_path / f"{way}-whole", tmp_path / f"{way}-killed")


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy_and_another_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """Two ranks of ZeRO-2 -> one rank of DDP -> two ranks of FSDP2: a part each, and the same run in the end."""
    whole = job("ddp", data, tmp_path, "plain", "whole")
    train_on_ranks(whole, [*job("zero2", data, tmp_path, "plain", "moved"), STOP.format(2)])
    train_on_ranks([*job("ddp", data, tmp_path, "plain", "moved"), "batch.micro=2", STOP.format(4)], ranks=1)
    train_on_ranks(job("fsdp2", data, tmp_path, "plain", "moved"))
    for row, other in zip(log(tmp_path / "whole"), log(tmp_path / "moved"), strict=True):
        assert other["step"] == row["step"] and other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    last = "checkpoints/step-00000006/weights.safetensors"
    weights, moved = (load_file(tmp_path / run / last) for run in ("whole", "moved"))
    for name, tensor in weights.items():
        assert (tensor - moved[name]).abs().max() <= 1e-5 * tensor.abs().max() + 1e-8, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_killed_at_the_worst_moments(strategy: str, data: Path, tmp_path: Path) -> None:
    """In the middle of an accumulation, of writing a checkpoint on a rank that writes, of a validation."""
    more = ["trainer.val_every=3"]
    writer = 0 if strategy == "ddp" else 1  # under DDP rank 0 writes for all
    moments = [("accumulation", 4, 1), ("save", 4, 0), ("save", 4, writer), ("validation", 3, 0)]
    for number, (when, step, rank) in enumerate(moments):
        kill = f"+callbacks.kill={{_target_: tests.support.audit.Kill, when: {when}, step: {step}, victim: {rank}}}"
        codes = train_on_ranks(job(strategy, data, tmp_path, "plain", f"killed{number}", *more, kill), check=False)
        assert codes[rank] == -9
        assert not (tmp_path / f"killed{number}" / "checkpoints/step-00000004").exists()
    names = ["whole", *(f"killed{number}" for number in range(len(moments)))]
    train_on_ranks(*(job(strategy, data, tmp_path, "plain", name, *more) for name in names), limit=500)
    for name in names[1:]:
        assert_same_end(tmp_path / "whole", tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_16_bits_resume_exactly_and_spare_rotary_positions(strategy: str, data: Path, tmp_path: Path) -> None:
    """The fp32 weights behind the 16-bit ones go on, not their rounded copies."""
    more = ["trainer.precision=bf16-mixed", "+callbacks.rotary={_target_: tests.support.audit.Rotary}"]
    cut = [*job(strategy, data, tmp_path, "plain", "cut", *more), STOP.format(4)]
    train_on_ranks(cut, *(job(strategy, data, tmp_path, "plain", name, *more) for name in ("cut", "whole")))
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    weights = load_file(tmp_path / "whole/checkpoints/step-00000006/weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    rows = [row for row in log(tmp_path / "whole") if row["split"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"]
