"""Runs over packed, mixed and budgeted streams: gradients as unpacked, exact resumption, audited samples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.audit import drawn
from tests.support.small_run import command, make_data, train
from tests.training.test_fit import assert_same_weights, checkpoint_of, metrics, stop_after
from vlm_train.errors import CheckpointError

SGD = ["optim=sgd", "~optim.betas", "optim.lr=0.1", "optim.weight_decay=0", "trainer.max_grad_norm=null"]
PACKED = ["data.pack=160", "data.max_length=120", "batch.micro=1"]
BUDGET = ["batch.samples=null", "batch.tokens=320", *PACKED]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def two_sources(data: Path) -> str:
    train_set, other = data / "tiny" / "train", data / "tiny" / "val"
    return f"data.train=[{{shards: {train_set}, name: a}}, {{shards: {other}, name: b}}]"


@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_packed_training_is_unpacked_training(normalize: str, data: Path, tmp_path: Path) -> None:
    more = [
        *SGD,
        "trainer.max_steps=2",
        "batch.samples=8",
        "lr_schedule.warmup_ratio=0",
        f"batch.normalize={normalize}",
    ]
    runs = [
        train(command(data, tmp_path, *more, "data.max_length=120", name="single")),
        train(command(data, tmp_path, *more, *PACKED, name="packed")),
    ]
    one, other = (load_file(checkpoint_of(run, 2) / "weights.safetensors") for run in runs)
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
    rows = [metrics(run) for run in runs]
    for single, packed in zip(*rows, strict=True):
        assert packed["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
        assert packed["supervised_share"] == pytest.approx(single["supervised_share"])
    assert rows[1][0]["padding_share"] < 0.2


def test_a_run_that_began_unpacked_goes_on_packed(data: Path, tmp_path: Path) -> None:
    """Rows only share out the samples of a step: the run keeps its name and its order, and learns the same."""
    more = [*SGD, "batch.samples=8", "trainer.max_steps=4", "trainer.save_every=2", "data.max_length=120"]
    whole, begun = (command(data, tmp_path / name, *more) for name in ("whole", "begun"))
    train(whole)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(begun)
    resumed = train([*begun, *PACKED])
    apart, packed = ([row["padding_share"] for row in metrics(run)] for run in (tmp_path / "whole/run", resumed))
    assert apart[:2] == packed[:2] and apart[2:] != packed[2:], "only the end of it is packed"
    one, other = (load_file(checkpoint_of(run, 4) / "weights.safetensors") for run in (tmp_path / "whole/run", resumed))
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 1e-5 * tensor.abs().max(), name


@pytest.mark.parametrize(
    "more",
    [
        PACKED,
        BUDGET,
        [*BUDGET, "trainer.max_steps=null", "trainer.epochs=3"],
        ["data.mixture=sqrt", "data.block_samples=8", "trainer.log_every=4"],
        ["data.shuffle=shards", "data.shuffle_buffer_shards=2", "data.workers=2"],
    ],
    ids=["packed", "budget", "budget-epochs", "mixture", "by-shards"],
)
def test_streams_resume_exactly(more: list[str], data: Path, tmp_path: Path) -> None:
    if "data.mixture=sqrt" in more:
        more = [*more, two_sources(data)]
    overrides = [command(data, tmp_path / name, *more) for name in ("one", "two")]
    one = train(overrides[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(overrides[1])
    two = train(overrides[1])
    assert metrics(one) == metrics(two) and metrics(one)
    assert_same_weights(one, two, metrics(one)[-1]["step"])


def test_a_run_does_not_go_on_in_another_order(data: Path, tmp_path: Path) -> None:
    """A named run keeps its name when its options change; its checkpoints stand in the old order."""
    train(command(data, tmp_path, *BUDGET, "trainer.max_steps=2"))
    for changed in (["batch.tokens=640"], ["data.pack=320"], ["seed=7"], ["data.shuffle=none"]):
        with pytest.raises(CheckpointError, match="order changed since"):
            train(
                command(data, tmp_path, *BUDGET, *changed, "resume=" + str(tmp_path / "run/checkpoints/step-00000002"))
            )


def test_realised_shares_are_logged(data: Path, tmp_path: Path) -> None:
    run = train(
        command(data, tmp_path, "data.mixture=sqrt", "data.block_samples=8", "trainer.log_every=2", two_sources(data))
    )
    for row in metrics(run):  # a block of 8: 5 of the 12 samples, 3 of the 4
        assert (row["share/a"], row["share/b"]) == (5 / 8, 3 / 8)


def test_a_weight_of_a_source_weighs_its_targets(data: Path, tmp_path: Path) -> None:
    heavy = two_sources(data).replace("name: b", "name: b, loss_weight: 0.0")
    runs = [
        train(
            command(data, tmp_path, "data.shuffle=none", "batch.samples=16", "trainer.max_steps=1", entries, name=name)
        )
        for name, entries in (("equal", two_sources(data)), ("none", heavy), ("alone", ""))
        if entries
    ]
    equal, none = (metrics(run)[0]["loss"] for run in runs)
    alone = train(command(data, tmp_path, "data.shuffle=none", "batch.samples=12", "trainer.max_steps=1", name="alone"))
    assert none == pytest.approx(metrics(alone)[0]["loss"], rel=1e-6) and none != pytest.approx(equal, rel=1e-4)


def test_stale_lengths_are_noticed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines.errors import DataError
    from vlm_train.data.dataset import Samples

    measure = Samples._measure_piece
    monkeypatch.setattr(Samples, "_measure_piece", lambda *args: (measure(*args)[0] - 1, 1))
    with pytest.raises(DataError, match=r"tokens, but \d+ were planned: .* Remove the folder data\.cache names"):
        train(command(data, tmp_path, *PACKED, f"data.cache={tmp_path}/lengths"))


def audited(overrides: list[str], folder: Path, kill_at: int = -1, victim: int = 0) -> int:
    """The exit code of a run in processes of its own, whose ranks note their samples in `folder`."""
    callback = {"_target_": "tests.support.audit.Audit", "folder": str(folder), "kill_at": kill_at, "victim": victim}
    more = [f"+callbacks.audit.{name}={value}" for name, value in callback.items()]
    command = [sys.executable, "-m", "vlm_train", *overrides, *more, "allow_targets=[tests.]"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, env=environment, timeout=150).returncode


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stream", [PACKED, BUDGET], ids=["packed", "budget"])
def test_audit_of_a_killed_run(stream: list[str], workers: int, ranks: int, data: Path, tmp_path: Path) -> None:
    """Killed in its second pass and resumed with other workers: every rank sees the same samples in the same places."""
    more = [*stream, "trainer.save_every=3", "trainer.max_steps=9", f"launch.devices={ranks}"]
    one, two = (
        command(data, tmp_path, *more, f"data.workers={count}", name=name)
        for name, count in (("whole", 0), ("killed", workers))
    )
    whole, killed, resumed = (tmp_path / f"audit-{name}" for name in ("whole", "killed", "resumed"))
    assert audited(one, whole) == 0
    assert audited(two, killed, kill_at=7, victim=ranks - 1) != 0
    assert audited([*two, f"data.workers={(workers + 1) % 3}"], resumed) == 0
    for rank in range(ranks):
        every = drawn(whole, rank)
        assert all(every[place] == keys for place, keys in drawn(killed, rank).items())
        assert drawn(resumed, rank) == {place: keys for place, keys in every.items() if place[0] >= 6}  # the checkpoint
    seen = [drawn(whole, rank) for rank in range(ranks)]
    counts = Counter(key for one_rank in seen for rows in one_rank.values() for row in rows for key in row)
    assert len(counts) == 12
    if stream is PACKED:  # with a budget, the packer of so small a set chooses among five passes ahead
        assert max(counts.values()) == min(counts.values()) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stream", [PACKED, BUDGET], ids=["packed", "budget"])
def test_two_ranks_equal_one(stream: list[str], data: Path, tmp_path: Path) -> None:
    more = [*SGD, *stream, "resume=never", "trainer.save_every=6"]
    for devices in (1, 2):
        arguments = command(data, tmp_path, *more, f"launch.devices={devices}", name=f"ranks{devices}")
        subprocess.run([sys.executable, "-m", "vlm_train", *arguments], check=True, timeout=120)
    one, two = (load_file(checkpoint_of(tmp_path / f"ranks{n}", 6) / "weights.safetensors") for n in (1, 2))
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() + 1e-9, name
    rows = [metrics(tmp_path / f"ranks{n}") for n in (1, 2)]
    for alone, shared in zip(*rows, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert torch.isfinite(torch.tensor(shared["grad_norm"]))
