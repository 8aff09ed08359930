"""The predicted size of a checkpoint against a written one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import small_run
from vlm_train.config.compose import compose_config
from vlm_train.dryrun.report import dry_run

OVERHEAD = 256 * 1024
"""Bytes of names, shapes and loop state, which do not grow with the model."""


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_is_as_large_as_predicted(precision: str, tmp_path: Path) -> None:
    data = small_run.make_data(tmp_path / "data")
    wide = ["llm.config.hidden_size=256", "llm.config.intermediate_size=512", "params=all"]
    short = ["trainer.max_steps=1", "trainer.save_every=null", f"trainer.precision={precision}"]
    overrides = small_run.command(data, tmp_path, *wide, *short)
    predicted = dry_run(compose_config([*overrides, "dry_run=true"]))["checkpoint_bytes"]
    run = small_run.train(overrides)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    written = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert predicted > 10 * OVERHEAD
    assert predicted == pytest.approx(written, rel=0.1, abs=OVERHEAD)
