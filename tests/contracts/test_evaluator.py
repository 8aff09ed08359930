"""Evaluators and metrics of a user's own package: recorded, shown, and followed by BEST in their own direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.nn import Linear

from tests.contracts.scripted import Undeclared, Undefined
from tests.support.small_run import command, make_data, train
from vlm_train.build import build_evaluators
from vlm_train.check.check import check_config
from vlm_train.checkpoint import files
from vlm_train.config.compose import compose_config
from vlm_train.contracts.evaluator import Findings
from vlm_train.errors import ConfigError
from vlm_train.evaluation.run import run_evaluator


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def scripted(data: Path, runs: Path, *more: str) -> list[str]:
    """A run of 4 steps with validations at 2 and 4, where `answers/distance` is 0.2 and 0.7, and 0.9 at the end."""
    own = ["eval=easyvqa", "eval.answers.majority_shards=null", "eval.answers.controls=[]", "allow_targets=[tests.]"]
    own += [f"eval.answers.{name}={data}/tiny/val" for name in ("shards", "validation_shards")]
    own += ["+eval.answers.metrics.mine._target_=tests.contracts.scripted.ScriptedMetric"]
    own += ["+eval.answers.metrics.mine.values=[0.2,0.7,0.9]", "eval.answers.max_new_tokens=2"]
    steps = ["trainer.max_steps=4", "trainer.val_every=2", "trainer.save_every=1", "trainer.keep_last=1"]
    return [*command(data, runs), *own, *steps, "trainer.best=answers/distance", *more]


def best_step(run: Path) -> int:
    """The step of the checkpoint that BEST names."""
    return int(files.read_pointer(run / "checkpoints" / "BEST").removeprefix("step-"))


@pytest.mark.parametrize(("higher_is_better", "expected"), [(False, 2), (True, 4)])
def test_best_follows_a_metric_in_its_own_direction(
    higher_is_better: bool, expected: int, data: Path, tmp_path: Path
) -> None:
    direction = f"+eval.answers.metrics.mine.higher_is_better={str(higher_is_better).lower()}"
    run = train(scripted(data, tmp_path, direction))
    assert best_step(run) == expected
    assert (run / "checkpoints" / f"step-{expected:08d}").is_dir()

    record = json.loads((run / "run.json").read_text())
    assert record["metrics"]["answers/distance"] == 0.9 and "answers/exact_match" in record["metrics"]
    described = {"exact_match": True, "distance": higher_is_better}
    assert record["evaluators"] == {"answers": {"primary": "exact_match", "higher_is_better": described}}
    assert [(row["metric"], row["eval"]) for row in record["results"] if row["name"] == "this run"] == [
        ("exact_match", "answers"), ("distance", "answers"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["split"], row["step"], row["answers/distance"]) for row in lines if "answers/distance" in row]
    assert found == [("val", 2, 0.2), ("val", 4, 0.7), ("test", 4, 0.9)]
    better = "higher" if higher_is_better else "lower"
    assert f"<h3>answers/distance ({better} is better)</h3>" in (run / "report.html").read_text()


def test_a_wrong_metric_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(compose_config(scripted(data, tmp_path, "trainer.best=answers/distanse")), need_assets=False)
    assert caught.value.problems == [
        "trainer.best: got 'answers/distanse'. Did you mean answers/distance? "
        "Allowed: loss, answers/exact_match, answers/distance."
    ]
    with pytest.raises(ConfigError, match=r"trainer.best: got 'answers/distance'\. Allowed: loss\."):
        unseen = scripted(data, tmp_path, "+eval.answers.at_validation=false")
        check_config(compose_config(unseen), need_assets=False)
    check_config(compose_config(scripted(data, tmp_path)), need_assets=False)


def test_what_is_no_number_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_evaluator("mine", Undefined(), Linear(1, 1), None, tmp_path, final=True)  # type: ignore[arg-type]
    assert found.metrics == {"good": 3.0} and [row.metric for row in found.rows] == ["good"]
    assert capsys.readouterr().out == "eval.mine: bad is nan and left out\n"


def test_findings_are_what_was_declared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.mine: declares .*'bad'.* but found \{'other': True\} with other"):
        run_evaluator("mine", Undeclared(), Linear(1, 1), None, tmp_path, final=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="higher_is_better: lacks 'b'; it names a"):
        Findings({"a": 1.0, "b": 1.0}, "a", {"a": True})


def test_what_is_no_evaluator_is_refused(data: Path, tmp_path: Path) -> None:
    more = ["eval=none", "+eval.mine._target_=tests.contracts.scripted.NotAnEvaluator"]
    cfg = compose_config(command(data, tmp_path, *more))
    with pytest.raises(
        ConfigError, match=r"eval\.mine: NotAnEvaluator is no Evaluator: no needs, primary, higher_is_b"
    ):
        build_evaluators(cfg)
