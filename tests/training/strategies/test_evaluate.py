"""Where ranks hold parts of the weights only, all of them evaluate together, and rank 0 exports what is on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data
from tests.training.strategies.test_parity import STRATEGIES, log


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_shards_evaluate_and_export_as_ddp_does(strategy: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")

    def job(name: str) -> list[str]:
        own = [*STRATEGIES[name], "batch.micro=2", "trainer.val_every=3", "trainer.export=true", "eval=easyvqa"]
        own += [f"eval.answers.shards={data}/tiny/val", f"eval.answers.validation_shards={data}/tiny/val"]
        own += ["eval.answers.majority_shards=[]", "eval.answers.controls=[]", "eval.answers.max_new_tokens=3"]
        return [one for one in command(data, tmp_path, *own, name=name) if one != "eval=none"]

    train_on_ranks(job("ddp"))
    train_on_ranks(job(strategy))
    one, other = (tmp_path / name for name in ("ddp", strategy))
    values = [
        [(row["step"], row["answers/exact_match"]) for row in log(run) if "answers/exact_match" in row]
        for run in (one, other)
    ]
    assert values[0] == values[1] and len(values[0]) >= 2
    answers = [json.loads((run / "run.json").read_text())["metrics"] for run in (one, other)]
    assert answers[0]["answers/exact_match"] == answers[1]["answers/exact_match"]
    assert (other / "export" / "model.safetensors").is_file()
