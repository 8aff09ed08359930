"""`mode=lengths`: what it says is what training meets, and it leaves the index behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.small_run import command, make_data
from vlm_train import cli
from vlm_train.data.survey import describe_lengths


def test_lengths_are_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    overrides = command(data, tmp_path / "runs", "data.pack=160", "data.max_length=120", "mode=lengths")
    assert cli.main(overrides) == 0
    said = capsys.readouterr().out
    assert "12 samples, " in said and "192 patches, at most 16 a sample" in said and "rows of 160 tokens: " in said
    (kept,) = (data / ".lengths").glob("*.npz")
    before = kept.stat().st_mtime_ns
    assert cli.main(overrides) == 0 and kept.stat().st_mtime_ns == before
    assert not (tmp_path / "runs").exists()


def test_samples_that_cannot_be_used_are_counted() -> None:
    line = describe_lengths(np.array([0, 10, 30, 0], np.int32), np.array([0, 1, 2, 0], np.int32))
    assert line.startswith("4 samples, 40 tokens: least 10, median 20, mean 20,")
    assert line.endswith("3 patches, at most 2 a sample; 2 cannot be used")
    assert describe_lengths(np.zeros(2, np.int32), np.zeros(2, np.int32)) == "2 samples; 2 cannot be used"
