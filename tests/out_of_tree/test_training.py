"""Every piece of the package trains from a command line, resumes exactly, and is planned by a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.out_of_tree.command_line import PIECES, read_weights, small_run, start
from tests.support.small_run import make_data

STOP = "+callbacks.stop={_target_: tests.support.audit.Stop, after: 1}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), rejected=True, text_only=True)


@pytest.mark.parametrize("piece", PIECES)
def test_it_trains_and_resumes_exactly(piece: str, data: Path, tmp_path: Path) -> None:
    """Two steps are one step, an interruption, and another one. Every second sample has no picture."""
    assert start(small_run(piece, data, tmp_path, name="whole")) == 0
    cut = small_run(piece, data, tmp_path, name="cut")
    assert start([*cut, STOP]) == 143
    assert not (tmp_path / "cut/checkpoints/step-00000002").exists()
    assert start(cut) == 0
    whole, resumed = read_weights(tmp_path / "whole"), read_weights(tmp_path / "cut")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = read_weights(tmp_path / "whole", step=1)
    assert any(not torch.equal(whole[name], before[name]) for name in whole), "the second step changed nothing"


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("size", [["size=tiny"], []], ids=["tiny", "whole"])
def test_its_dry_run_plans_it(
    piece: str, size: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [one for one in small_run(piece, data, tmp_path, "dry_run=true") if one != "size=tiny"]
    assert start([*fixed, *size]) == 0
    printed = capsys.readouterr().out
    assert "Round trip  a small twin was saved and loaded" in printed
    assert not (tmp_path / "run").exists()
