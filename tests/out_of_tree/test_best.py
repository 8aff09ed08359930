"""BEST follows the word error rate of the package downwards, also through a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.out_of_tree.command_line import TRUST, start
from tests.support.small_run import command, make_data
from vlm_train.checkpoint import files

RATE = "answers/word_error_rate"


def measured_run(runs: Path, name: str) -> list[str]:
    """A run that measures its word error rate at every step, and learns fast enough to change it."""
    data = runs / "data"
    answers = ["eval=easyvqa", "eval.answers.majority_shards=null", "eval.answers.controls=[]"]
    answers += [f"eval.answers.{key}={data}/tiny/val" for key in ("shards", "validation_shards")]
    answers += ["+metric@eval.answers.metrics.mine=my_word_error_rate", "eval.answers.max_new_tokens=8"]
    steps = ["trainer.max_steps=2", "trainer.val_every=1", "trainer.save_every=1", "trainer.keep_last=1"]
    learns = ["params=all", "optim.lr=0.03", "optim.betas=[0.9,0.9]"]
    return command(data, runs, TRUST, *answers, *steps, *learns, f"trainer.best={RATE}", name=name)


def read_rates(run: Path) -> dict[int, float]:
    """Step -> the rate at its validation."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[RATE] for row in rows if row["split"] == "val" and RATE in row}


def best_step(run: Path) -> int:
    return int(files.read_pointer(run / "checkpoints" / "BEST").removeprefix("step-"))


def test_best_is_the_checkpoint_with_the_lower_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "data")
    assert start(measured_run(tmp_path, "run")) == 0
    rates = read_rates(tmp_path / "run")
    assert sorted(rates) == [1, 2] and rates[1] != rates[2]
    assert best_step(tmp_path / "run") == min(rates, key=rates.__getitem__)

    from my_vlm.word_error_rate import WordErrorRate  # type: ignore[import-not-found]

    monkeypatch.setattr(WordErrorRate, "higher_is_better", {"word_error_rate": True})  # the direction decides
    assert start(measured_run(tmp_path, "wrong")) == 0
    assert read_rates(tmp_path / "wrong") == rates
    assert best_step(tmp_path / "wrong") == max(rates, key=rates.__getitem__)


def test_the_rate_is_that_of_words() -> None:
    from my_vlm.word_error_rate import WordErrorRate  # type: ignore[import-not-found]

    def rate(prediction: str, *references: str) -> float:
        return WordErrorRate()([prediction], [references])["word_error_rate"]

    assert rate("a red square", "a red square") == 0
    assert rate("a red", "a red square") == pytest.approx(1 / 3)
    assert rate("the blue square here", "a red square") == pytest.approx(1.0)
    assert rate("", "yes") == 1 and rate("yes", "no", "yes") == 0
    assert WordErrorRate()(["a b", "c"], [["a b"], ["d"]])["word_error_rate"] == pytest.approx(1 / 3)
