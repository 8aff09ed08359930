"""The benchmarks' arithmetic, and that both sides of the loader's line make the same pixels."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import corpus, data
from benchmarks.measure import Line, paired, rate


def test_a_ratio_is_the_median_of_pairs_after_a_warm_up() -> None:
    ours, theirs = iter([99.0, 2.0, 6.0, 4.0]), iter([1.0, 1.0, 2.0, 1.0])
    line = paired("x", lambda: next(ours), lambda: next(theirs), pairs=3, must=3.5)
    assert (line.value, line.ours, line.theirs, line.verdict) == (3.0, 4.0, 1.0, "MISSED")


@pytest.mark.parametrize(("value", "less", "verdict"), [(3, False, "aim"), (2, False, "must"), (0, True, "aim")])
def test_verdicts(value: float, less: bool, verdict: str) -> None:
    goals = {"must": 2.0, "aim": 1.0 if less else 3.0}
    assert Line(name="x", value=value, less=less, **goals).verdict == verdict
    assert Line(name="x", value=9.0 if less else 1.0, less=less, **goals).verdict == "MISSED"
    assert Line(name="x", value=None, **goals).verdict == Line(name="x", value=1.0).verdict == ""


def test_a_rate_leaves_the_first_batches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert rate([1, 1, 10, 20], lambda size: size, skip=2) == 30 / (8.0 - 6.0)


def test_both_sides_make_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpus.SIZES, "small", (360, 345))
    monkeypatch.setattr(corpus, "PICTURES", 2)
    data.check_pixels(corpus.shard_set(tmp_path, "small", 8))


def test_an_unknown_line_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["lines=[loader,wrong]"]) == 2
    assert "no wrong; allowed: loader" in capsys.readouterr().err
