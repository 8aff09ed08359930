"""A small run of an encoder-decoder: trained, and asked questions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.small_run import command, make_data, train
from vlm_train import cli

pytestmark = pytest.mark.slow

PAIR = ["model=prefix_seq2seq", "llm=flant5_xl", "template=seq2seq", "objective.lm.stream=decoder"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def overrides(data: Path, runs: Path, *more: str) -> list[str]:
    return command(data, runs, *PAIR, "data.annotations=first", *more)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    found = losses(train(overrides(data, tmp_path, "optim.lr=0.01")))
    assert all(map(math.isfinite, found.values())) and found[6] < 0.9 * found[1]


def test_it_answers_questions(data: Path, tmp_path: Path) -> None:
    asked = ["eval=easyvqa", f"eval.answers.shards={data}/tiny/val", "eval.answers.majority_shards=[]"]
    asked += ["eval.answers.validation_shards=null", "eval.answers.max_new_tokens=3", "eval.answers.published=[]"]
    assert cli.main(overrides(data, tmp_path, "trainer.max_steps=2", *asked)) == 0
    found = [json.loads(line) for line in next((tmp_path / "run").rglob("predictions.jsonl")).read_text().splitlines()]
    assert [row["reference"] for row in found][:2] == ["shape 0", "shape shape 1"]
