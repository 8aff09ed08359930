"""What a teacher said before, its most likely tokens beside the shards, stands for the teacher itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.top_tokens import array_file, open_top_tokens
from tests.support.small_run import command, make_data, train
from vlm_train import cli
from vlm_train.build import build_assembly
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import TopTokenBatch
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.errors import ConfigError
from vlm_train.objectives.distill import Distillation
from vlm_train.training.reference import frozen

READ = "objective.distill.teacher_columns=[teacher]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("columns"), text_only=True)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("teacher")
    return train(command(data, runs, "params=all", "optim.lr=0.01", "trainer.export=false", name="teacher"))


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A student, a teacher with other weights, and a batch."""
    configs = [compose_config(command(data, tmp_path_factory.mktemp("runs"), f"seed={seed}")) for seed in (1, 2)]
    built, other = (build_assembly(cfg) for cfg in configs)
    rows = []
    for sample, blobs in ShardSet(data / "tiny/val"):
        rows.append([Example(built.processor.render(sample), built.processor.make_views(blobs, media=sample.media))])
    batch = collate_rows(rows, built.processor.images)
    return built.model.eval().requires_grad_(True), other.model.eval().requires_grad_(False), batch


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    return model.logits(model(batch).flatten(0, 1)[batch.text["llm"].supervised])


def with_top(batch: Any, teacher: Any, top_k: int | None, temperature: float = 1.0) -> Any:
    logps = (logits_of(teacher, batch) / temperature).log_softmax(-1)
    best, ids = logps.topk(top_k or logps.shape[-1])
    told = TopTokenBatch(ids=ids, logps=best, vocab_size=logps.shape[-1])
    return replace(batch, top_tokens={"teacher": told}, shared={})


def gradients_of(student: Any, loss: Any) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss.sum.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"chunk": 3}, {"temperature": 2.0}])
def test_the_whole_vocabulary_is_the_live_teacher(models: Any, settings: dict[str, Any]) -> None:
    student, teacher, batch = models
    batch.shared.clear()
    live = Distillation(**settings)(student, batch, StepContext(reference=partial(frozen, teacher)))["distill"]
    expected = gradients_of(student, live)
    whole = with_top(batch, teacher, None, settings.get("temperature", 1.0))
    found = Distillation(teacher_columns=["teacher"], **settings)(student, whole, StepContext())["distill"]
    assert found.sum.item() == pytest.approx(live.sum.item(), rel=1e-5) and live.sum > 0.01
    assert found.metrics["agreement"] == live.metrics["agreement"] and found.count == live.count
    for name, gradient in gradients_of(student, found).items():
        least = 1e-7 if name.endswith("k_proj.bias") else 0.0  # no softmax sees it: its gradient is rounding
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + least, name


def test_all_other_tokens_are_one_outcome(models: Any) -> None:
    student, teacher, batch = models
    p, q = (logits_of(model, batch).softmax(-1) for model in (teacher, student))
    best, ids = p.topk(3)
    told, own = (torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=1) for top in (best, q.gather(1, ids)))  # [S, 4]
    weights = batch.text["llm"].weights.flatten()[batch.text["llm"].supervised]
    expected = (F.kl_div(own.log(), told, reduction="none").sum(-1) * weights).sum()
    top = with_top(batch, teacher, 3)
    found = Distillation(teacher_columns=["teacher"])(student, top, StepContext())["distill"]
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-4)
    whole = F.kl_div(q.log(), p, reduction="none").sum(-1) * weights
    assert found.sum < whole.sum()  # what is joined cannot differ


def test_other_vocabularies_and_wrong_settings_are_refused(models: Any) -> None:
    student, teacher, batch = models
    top = with_top(batch, teacher, 3).top_tokens["teacher"]
    other = replace(batch, top_tokens={"teacher": replace(top, vocab_size=7)}, shared={})
    with pytest.raises(ConfigError, match="teacher_columns: the teacher has a vocabulary of 7 tokens, the student"):
        Distillation(teacher_columns=["teacher"])(student, other, StepContext())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"teacher_columns": "teacher"}, "got teacher; allowed: none, or the name of one"),
        ({"teacher_columns": ["a", "b"]}, "allowed: none, or the name of one"),
        ({"teacher_columns": ["teacher"], "divergence": "reverse"}, "got divergence=reverse"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            Distillation(**settings)


def score(teacher: Path, data: Path, *more: str) -> list[str]:
    """Write the columns of both splits; the overrides of a run that reads them."""
    for split in ("train", "val"):
        scored = ["mode=score", "columns.scores=teacher", f"columns.shards={data}/tiny/{split}", "columns.batch=3"]
        assert cli.main([*scored, f"run={teacher}", *more]) == 0
    entries = [f"+data.{split}.0.columns={data}/tiny/{split}.columns/teacher" for split in ("train", "val")]
    return [*entries, READ]


def student(data: Path, runs: Path, *more: str, name: str) -> list[str]:
    settings = [
        "params=all",
        "optim=sgd",
        "~optim.betas",
        "optim.lr=0.1",
        "trainer.export=false",
        "trainer.log_every=1",
        "seed=7",
    ]
    settings += ["trainer.save_every=null", "trainer.val_every=3", "objective=distill"]
    return command(data, runs, *settings, *more, name=name)


def read_lines(run: Path, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def test_a_run_with_columns_is_the_run_with_a_live_teacher(teacher: Path, tmp_path: Path) -> None:
    """With all of the vocabulary in the columns; they are stored in half precision."""
    data = make_data(tmp_path / "data", text_only=True)
    live = train(student(data, tmp_path, f"reference.model={teacher}", name="live"))
    columns = score(teacher, data, "columns.top_k=100000")
    for micro in (2, 1):
        read = train(student(data, tmp_path, *columns, f"batch.micro={micro}", name=f"read{micro}"))
        for split in ("train", "val"):
            rows, same = read_lines(live, split), read_lines(read, split)
            assert [row["distill_loss"] for row in same] == pytest.approx(
                [row["distill_loss"] for row in rows], rel=2e-3, abs=2e-4
            )
    top = score(teacher, make_data(tmp_path / "few", text_only=True), "columns.top_k=2")
    few = train(student(tmp_path / "few", tmp_path, *top, "objective.lm.weight=0", name="few"))
    losses = [row["distill_loss"] for row in read_lines(few, "train")]
    assert losses[-1] < losses[0]


def test_columns_of_other_settings_are_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", text_only=True)
    run = student(data, tmp_path, *score(teacher, data), name="run")
    assert cli.main([*run, "dry_run=true"]) == 0
    for setting, said in (
        ("objective.distill.temperature=2", "columns.temperature (1.0)"),
        ("data.max_length=40", "data.max_length (512)"),
        ("template=chatml", "template"),
        ("image=pad", "image"),
    ):
        assert cli.main([*run, setting]) == 2
        error = capsys.readouterr().err
        assert f"data.train.0.columns: {data}/tiny/train.columns/teacher was computed with another {said}." in error
    scored = ["mode=score", "columns.scores=teacher", f"columns.shards={data}/tiny/val", f"run={teacher}"]
    assert cli.main([*scored, "columns.top_k=3"]) != 0
    assert (
        "holds columns made with other arguments (about.batch: 3 there, 64 now; about.top_k: 16 there, 3 now)"
        in capsys.readouterr().err
    )


def test_damaged_records_are_refused(teacher: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", text_only=True)
    score(teacher, data, "columns.top_k=4")
    shards, folder = ShardSet(data / "tiny/train"), data / "tiny/train.columns/teacher"

    def open_columns() -> Any:
        return open_top_tokens(Columns(folder, shards, ["teacher"], option="columns"), "teacher", shards)

    column = open_columns()
    learned = int(column.places[6][1])
    told = column.read_sample(6, learned)
    assert told.ids.shape == told.logps.shape and told.ids.shape[1] == 4
    assert (np.diff(told.logps.astype(np.float32), axis=1) <= 0).all() and told.ids.dtype == np.int32
    with pytest.raises(BadSample, match="tokens, the sample"):
        column.read_sample(6, learned + 1)
    file = folder / array_file(1)
    whole = file.read_bytes()
    first, count = (int(one) for one in column.places[6])
    size = len(told.ids[0]) * 6
    for at, value, message in ((0, 2**31 - 1, "cannot be"), (0, -1, "cannot be")):
        changed = bytearray(whole)
        changed[first * size + at : first * size + at + 4] = value.to_bytes(4, "little", signed=True)
        file.write_bytes(changed)
        with pytest.raises(BadSample, match=message):
            column.read_sample(6, learned)
    with pytest.raises(DataError, match="the shard's records were changed"):
        open_columns()
    file.write_bytes(whole[: first * size + size * count - 1])
    with pytest.raises(BadSample, match="ends before"):
        column.read_sample(6, learned)
    with pytest.raises(DataError, match="no whole number of records of 24"):
        open_columns()
    file.write_bytes(whole[:size])
    with pytest.raises(DataError, match="outside of its 1 records"):
        open_columns()
    file.unlink()
    with pytest.raises(DataError, match="make the columns again"):
        open_columns()
