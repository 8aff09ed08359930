"""The preference objective of the package: per sample, so the same however a step is cut, packed or spread."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data_pipelines.shards.columns import ColumnWriter
from data_pipelines.shards.shard_set import ShardSet
from tests.out_of_tree.command_line import CONF, HERE, SEARCH, TRUST, assert_equal_weights, small_run, start
from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data
from vlm_train.build import build_assembly, build_data
from vlm_train.config.compose import compose_config
from vlm_train.contract.command import main as start_contract
from vlm_train.data.collate import Example, collate_rows
from vlm_train.errors import ConfigError

SGD = ["optim=sgd", "~optim.betas", "optim.lr=0.05", "params=all"]
COLUMNS = ("chosen", "rejected", "note")
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


@pytest.fixture(scope="module")
def columns(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model at first says of the answers, in columns beside the shards: `<split>/` for every split."""
    from my_vlm.preference import Preference, sum_log_likelihoods  # type: ignore[import-not-found]

    folder = tmp_path_factory.mktemp("columns")
    cfg = compose_config(small_run("preference", data, folder), [CONF])
    assembly = build_assembly(cfg)
    samples = build_data(cfg, assembly.processor).train
    model = assembly.model.eval()
    for split in ("train", "val"):
        shards = ShardSet(data / "tiny" / split)
        writer = ColumnWriter(folder / split, shards, COLUMNS, {"model": "start"})
        for shard, first in enumerate(shards.shard_starts):
            rows = []
            for number in range(first, first + shards.manifest.shards[shard].samples):
                one = samples.processor.render(shards.load_sample(number)[0], samples.render_options)
                views = samples.processor.make_views(shards.load_sample(number)[1], shown=one.media)
                batch = collate_rows([[Example(one, views)]], samples.processor.images)
                with torch.no_grad():
                    said = [float(sum_log_likelihoods(model, batch, stream)) for stream in Preference.streams]
                rows.append({"key": shards.key(number), **dict(zip(COLUMNS, [*said, "text"], strict=True))})
            writer.write_rows(shard, rows)
        writer.write_manifest()
    return folder


def beside(columns: Path) -> list[str]:
    """A run that reads the reference from columns."""
    entries = [f"+data.{split}.0.columns={columns / split}" for split in ("train", "val")]
    return [*entries, "reference.model=null", f"objective.preference.reference_columns=[{','.join(COLUMNS[:2])}]"]


@pytest.mark.parametrize(
    "cut", [["batch.micro=4"], ["batch.micro=1", "data.pack=256", "data.max_length=256"]], ids=["whole", "packed"]
)
def test_columns_beside_the_shards_stand_for_the_reference(
    cut: list[str], data: Path, whole: Path, columns: Path, tmp_path: Path
) -> None:
    cache = f"data.cache={tmp_path}/lengths"
    assert start(small_run("preference", data, tmp_path, *SGD, *cut, *beside(columns), cache)) == 0
    assert_equal_weights(whole, tmp_path / "run")


def test_a_dry_run_and_the_contract_check_need_no_numbers(
    data: Path, columns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(small_run("preference", data, tmp_path, *SGD, *beside(columns), "dry_run=true")) == 0
    assert start_contract(["--config-dir", str(CONF), TRUST, "objective=my_preference", beside(columns)[-1]]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_columns_that_are_missing_are_told_before_weights_are_read(
    data: Path, columns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run("preference", data, tmp_path, *SGD)
    given = beside(columns)
    for code, overrides, said in (
        (2, given[1:], "reads the columns chosen, rejected. Set data.train.0.columns=<folder>"),
        (2, [*given[:-1], "objective.preference.reference_columns=[chosen,other]"], "reads the column 'other'"),
        (2, [f"+data.train.0.columns={tmp_path}", *given[1:]], "data.train.0.columns: "),
        (1, [*given, f"data.train.0.columns={columns}/val"], "is of another shard set"),
    ):
        assert start([*run, *overrides]) == code
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, error
    assert not (tmp_path / "run/checkpoints").exists()


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
