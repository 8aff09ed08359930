"""The length of a run: what training counts is what the dry run says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import small_run
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.dryrun.length import one_pass, planned_samples, predict_length
from vlm_train.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "samples", "total"),
    [
        (["trainer.epochs=1"], 12, 12),
        (["trainer.epochs=1.26"], 12, 16),  # rounded up: 15.12
        (["data.val=[]", "data.val_share=0.25"], 9, 9),
        (["data.val=[]", "data.val_share=0.01"], 11, 11),  # at least one is held out
        (["data.val_share=0.25"], 12, 12),  # which has a val of its own
        (["data.limit=5", "trainer.epochs=2"], 5, 10),
        (["trainer.epochs=5", "trainer.max_steps=3"], 12, 12),
    ],
)
def test_epochs_limits_and_held_out_samples(options: list[str], samples: int, total: int) -> None:
    cfg = compose_tiny("recipe=llava15_stage2", "trainer.epochs=1", "trainer.max_steps=null", *options)
    assert one_pass(cfg, 12) == samples
    assert planned_samples(cfg, samples) == total


def test_every_source_counts_by_itself(tmp_path: Path) -> None:
    data = small_run.make_data(tmp_path / "data")
    sources = [f"shards: {data}/tiny/train, repeat: 1.5", f"shards: {data}/tiny/train", f"shards: {data}/tiny/val"]
    entries = ", ".join(f"{{{one}}}" for one in (*sources, f"shards: {data}/tiny/train, limit: 2"))
    options = ["trainer.max_steps=null", "trainer.epochs=1", "data.limit=10", f"data.train=[{entries}]"]
    cfg = compose_config(small_run.command(data, tmp_path, *options))
    assert predict_length(cfg, tokens_per_sample=100).samples == 15 + 10 + 4 + 2


def test_no_length_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.epochs and trainer\.max_steps are both null"):
        planned_samples(compose_tiny("recipe=llava15_stage2", "trainer.max_steps=null"), 12)


def test_the_dry_run_says_what_training_does(tmp_path: Path) -> None:
    data = small_run.make_data(tmp_path / "data")
    options = ["trainer.max_steps=null", "trainer.epochs=1.3", "data.val=[]", "data.val_share=0.2", "batch.micro=4"]
    overrides = small_run.command(data, tmp_path, *options, "trainer.save_every=null")
    said = predict_length(compose_config(overrides), tokens_per_sample=100)
    run = small_run.train(overrides)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert (said.samples, checkpoint.name) == (10, f"step-{said.steps:08d}")
