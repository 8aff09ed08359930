"""One of two ranks fails: all end within seconds, and what is said last is the error that came first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.test_signals import data, two_ranks  # noqa: F401
from tests.support import ranks
from tests.support.small_run import make_data
from vlm_train.runs import record

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_shards_are_refused_on_every_rank(damage: str, tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    shard = sorted((root / "tiny" / "train").glob("*.tar"))[-1]
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    ended = ranks.run(two_ranks(root, tmp_path), tmp_path / "out")
    assert ended.codes[0] == ended.codes[1] and ended.codes[0] in (1, 2), ended.output
    assert shard.name in ended.output and "Traceback" not in ended.output, ended.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("what", "workers"), [("raise", 0), ("data", 0), ("data", 1)])
def test_the_first_error_is_said_last(what: str, workers: int, rank: int, data: Path, tmp_path: Path) -> None:  # noqa: F811
    overrides = two_ranks(data, tmp_path, "launch.devices=2", f"data.workers={workers}")
    ended = subprocess.run(
        [sys.executable, "-m", "vlm_train", *overrides],
        env={**os.environ, "FAULT": f"{what} {rank} 3", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[0].startswith("ChildError: fit of run failed (exit code 1). Its output:")
    last = ended.stderr.splitlines()[-1]
    assert f"Rank {rank} failed first: ValueError: " in last and "the original error" in last
    assert "Traceback" in ended.stdout and "ValueError: the original error" in ended.stdout
    assert record.read_record(tmp_path / "run")["status"] == "failed"
