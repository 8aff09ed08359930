"""A small run of InstructBLIP with either kind of language model: trained, asked questions, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

from tests.support.small_run import make_data
from vlm_train import cli

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["instructblip_vicuna7b", "instructblip_flant5xl"])
def test_it_trains_answers_and_is_exported(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    asked = ["eval=easyvqa", f"eval.answers.shards={data}/tiny/val", "eval.answers.majority_shards=[]"]
    asked += ["eval.answers.validation_shards=null", "eval.answers.max_new_tokens=3", "eval.answers.published=[]"]
    small = ["size=tiny", f"paths.data={data}", f"paths.runs={tmp_path}", "run_name=run", "init_from=[]"]
    assert cli.main([f"recipe={recipe}", "trainer.max_steps=2", *small, *asked]) == 0
    run = tmp_path / "run"
    found = [json.loads(line) for line in next(run.rglob("predictions.jsonl")).read_text().splitlines()]
    assert [row["reference"] for row in found][:2] == ["shape 0", "shape shape 1"]
    assert cli.main([f"run={run}", "mode=export"]) == 0
    assert "what it computes equals the run's" in capsys.readouterr().out
    assert InstructBlipForConditionalGeneration.from_pretrained(run / "export").config.num_query_tokens == 4
    assert AutoProcessor.from_pretrained(run / "export").num_query_tokens == 4
