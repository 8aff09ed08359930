"""The benchmarks' arithmetic, and that the sides of a comparison do the same work."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import corpus, data, native, sides, trainer, work
from benchmarks.measure import Line, in_turns, paired, rate


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


def test_a_padded_tower_gives_the_features_of_a_packed_one() -> None:
    tower, media = native.make_tower(), native.make_media(4)
    with torch.no_grad():
        packed, padded = tower.encode(media).values, native.encode_padded(tower, media)
    assert (packed - padded).abs().max() <= 1e-5 * packed.abs().max()


def test_an_unknown_line_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["lines=[loader,wrong]"]) == 2
    assert "no wrong; allowed: loader" in capsys.readouterr().err


@pytest.mark.slow
def test_every_side_of_the_trainer_ends_in_the_same_weights() -> None:
    """One step each from the same weights: the same loss, optimizer, schedule and clipping."""
    pytest.importorskip("accelerate")
    llava = work.small_llava(1, "size=tiny")
    start = [p.detach().clone() for p in llava.learned]
    ends = []
    for side in (sides.plain, sides.ours, sides.bare_lightning, sides.hf_trainer):
        with torch.no_grad():
            for parameter, value in zip(llava.learned, start, strict=True):
                parameter.copy_(value)
        assert len(side(llava, 2).ends) == 2
        ends.append([p.detach().clone() for p in llava.learned])
    assert any(not torch.equal(a, b) for a, b in zip(ends[0], start, strict=True)), "something is learned"
    for others in ends[1:]:
        for one, other in zip(ends[0], others, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_saves_are_timed_and_weighed() -> None:
    saved, blocked, sizes = work.toy(64, "trainer.save_every=2"), [], []
    sides.ours(saved, 4, saves=blocked, look=lambda folder: sizes.append(trainer.newest_bytes(folder / "checkpoints")))
    assert len(blocked) == 2 and min(blocked) > 0
    assert sizes[0] > 3 * 4 * 64 * 64
    sides.ours(work.toy(64), 4, look=lambda folder: sizes.append(len(list(folder.glob("checkpoints/*")))))
    assert sizes[1] == 0, "without `saves` nothing is saved"


def test_the_fixed_cost_is_the_median_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": iter([9.0, 0.003, 0.005, 0.004]), "theirs": iter([1.0, 0.001, 0.001, 0.001])}
    side = lambda name: lambda work, steps: SimpleNamespace(step=next(times[name]))  # noqa: E731
    monkeypatch.setattr(sides, "plain", side("theirs"))
    line = trainer.added("x", side("ours"), None, 1, pairs=3, must=2.0)
    assert (round(line.value, 9), line.verdict, line.pairs) == (3.0, "MISSED", 3)


def test_a_clock_leaves_the_first_steps_out() -> None:
    assert work.Clock(skip=2, ends=[0.0, 10.0, 11.0, 13.0]).step == 1.5


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert trainer.missing("HF Trainer") == "pip install accelerate" and not trainer.missing("plain loop")


def test_an_unknown_line_of_the_trainer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(["lines=[wrong]"]) == 2
    assert "no wrong; allowed: step, fused, fixed" in capsys.readouterr().err


def sleeper(seconds: float, tick: Any) -> None:
    for _ in range(4):
        time.sleep(seconds)
        tick()


@pytest.mark.timeout(120)
def test_programs_take_turns() -> None:
    """Each step is timed by itself, not with those of the other."""
    found = in_turns(partial(sleeper, 0.01), partial(sleeper, 0.5), 4)
    assert len(found) == 4 and all(0.01 <= a < 0.5 <= b for a, b in found[1:])
