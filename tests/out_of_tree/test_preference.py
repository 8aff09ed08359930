"""The preference objective of the package: per sample, so the same however a step is cut, packed or spread."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.out_of_tree.command_line import HERE, SEARCH, assert_equal_weights, small_run, start
from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data
from vlm_train.errors import ConfigError

SGD = ["optim=sgd", "~optim.betas", "optim.lr=0.05", "params=all"]
LAST = "checkpoints/step-00000002/weights.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), rejected=True)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, each step one micro-batch."""
    runs = tmp_path_factory.mktemp("runs")
    assert start(small_run("preference", data, runs, *SGD, "batch.micro=4")) == 0
    return runs / "run"


def test_it_learns_from_its_reference_which_is_never_saved(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the reference is the model at first"
    assert losses[1] < losses[0]
    with safe_open(whole / LAST, "pt") as file:
        assert not any("reference" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    "cut", [["batch.micro=1"], ["batch.micro=4", "data.pack=256", "data.max_length=256"]], ids=["micro", "packed"]
)
def test_a_step_is_the_same_however_it_is_cut(cut: list[str], data: Path, whole: Path, tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path}/lengths"
    assert start(small_run("preference", data, tmp_path, *SGD, *cut, cache)) == 0
    assert_equal_weights(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_two_ranks_compute_what_one_process_does(strategy: str, data: Path, whole: Path, tmp_path: Path) -> None:
    job = small_run("preference", data, tmp_path, *SGD, "batch.micro=1", f"strategy={strategy}", SEARCH)
    train_on_ranks(job, packages=[HERE])
    assert_equal_weights(whole, tmp_path / "run")


@pytest.mark.parametrize("mode", [[], ["dry_run=true"]], ids=["fit", "dry run"])
def test_a_teacher_of_another_image_size_is_refused_before_weights_are_read(
    mode: list[str], data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = small_run("preference", data, tmp_path, *SGD, *mode, f"reference.model={whole}", name="taught")
    assert start([*taught, "vision.config.image_size=48"]) == 2
    said = "reference.model: its encoder 'vision' takes images of (32, 32) pixels; the run's encoders are given"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "taught/checkpoints").exists()
    if mode:
        assert start(taught) == 0


def test_a_value_out_of_range_is_one_clear_error() -> None:
    from my_vlm.preference import Preference  # type: ignore[import-not-found]

    with pytest.raises(ConfigError, match=r"got beta=-1, label_smoothing=0.0; allowed: beta above 0"):
        Preference(beta=-1)
