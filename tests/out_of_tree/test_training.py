"""Every piece of the package trains from a command line, resumes exactly, and is planned by a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.out_of_tree.command_line import PIECES, assert_resumes_exactly, small_run, start
from tests.support.small_run import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), rejected=True, text_only=True)


@pytest.mark.parametrize("piece", PIECES)
def test_it_trains_and_resumes_exactly(piece: str, data: Path, tmp_path: Path) -> None:
    """Every second sample has no picture."""
    assert_resumes_exactly(lambda name: small_run(piece, data, tmp_path, name=name), tmp_path)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("size", [["size=tiny"], []], ids=["tiny", "whole"])
def test_its_dry_run_plans_it(
    piece: str, size: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [one for one in small_run(piece, data, tmp_path, "dry_run=true") if one != "size=tiny"]
    assert start([*fixed, *size]) == 0
    printed = capsys.readouterr().out
    assert "Round trip  a tiny copy was saved and loaded" in printed
    assert not (tmp_path / "run").exists()
