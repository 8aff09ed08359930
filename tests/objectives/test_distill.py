"""Distillation equals its formula, loss and gradients, whatever the chunks; and a run of it learns from its teacher."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data_pipelines.shards.shard_set import ShardSet
from tests.support.small_run import command, make_data, train
from vlm_train.build import build_assembly
from vlm_train.config.compose import compose_config
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.errors import ConfigError
from vlm_train.objectives.distill import Distillation
from vlm_train.training.reference import frozen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("distill"), text_only=True)


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A student, a teacher with other weights, and a batch."""
    built = build_assembly(compose_config(command(data, tmp_path_factory.mktemp("runs"))))
    processor, student = built.processor, built.model.eval().requires_grad_(True)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.1)
    rows = []
    for sample, blobs in ShardSet(data / "tiny/val"):
        rows.append([Example(processor.render(sample), processor.make_views(blobs, media=sample.media))])
    return student, teacher.requires_grad_(False), collate_rows(rows, processor.images)


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    return model.logits(model(batch).flatten(0, 1)[batch.text["llm"].supervised])


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 3}, {"chunk": 2, "temperature": 2.0}])
def test_it_is_the_divergence_of_the_papers(models: Any, divergence: Any, settings: dict[str, Any]) -> None:
    student, teacher, batch = models
    batch.shared.clear()  # passes of the last test, whose graph is spent
    student.zero_grad()
    heat = settings.get("temperature", 1.0)
    stream = batch.text["llm"]
    p, q = ((logits_of(model, batch) / heat).softmax(-1) for model in (teacher, student))
    one, other = (p.detach(), q) if divergence == "forward" else (q, p.detach())
    weights = stream.weights.flatten()[stream.supervised]
    expected = ((one * (one.log() - other.log())).sum(-1) * weights).sum() * heat**2
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    context = StepContext(reference=partial(frozen, teacher))
    found = Distillation(divergence=divergence, **settings)(student, batch, context)["distill"]
    found.sum.backward()
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0.1
    assert found.count == weights.sum()
    agreed = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert found.metrics["agreement"] == pytest.approx(agreed.item())
    assert len(gradients) > 10 and all(weight.grad is None for weight in teacher.parameters())
    for name, weight in student.named_parameters():
        if name in gradients:
            least = 1e-7 if name.endswith("k_proj.bias") else 0.0  # no softmax sees it: its gradient is rounding
            assert (weight.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max() + least, name


def test_the_forward_one_is_cross_entropy_less_the_teacher_s_entropy(models: Any) -> None:
    student, teacher, batch = models
    batch.shared.clear()
    told, own = logits_of(teacher, batch), logits_of(student, batch)
    weights = batch.text["llm"].weights.flatten()[batch.text["llm"].supervised]
    entropy = torch.distributions.Categorical(logits=told).entropy()
    expected = ((F.cross_entropy(own, told.softmax(-1), reduction="none") - entropy) * weights).sum()
    context = StepContext(reference=partial(frozen, teacher))
    found = Distillation()(student, batch, context)["distill"]
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_comes_closer_to_its_teacher(data: Path, tmp_path: Path) -> None:
    teacher = train(command(data, tmp_path, "params=all", "optim.lr=0.01", "trainer.export=false", name="teacher"))
    common = [
        "trainer.max_steps=30",
        "trainer.save_every=null",
        "params=all",
        "optim.lr=0.01",
        "trainer.export=false",
        "trainer.log_every=1",
        "seed=7",
    ]
    taught = ["objective=distill", f"reference.model={teacher}", "batch.micro=4"]
    student = train(command(data, tmp_path, *common, *taught, name="student"))
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    losses = [row["distill_loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0] and {"lm_loss"} <= rows[0].keys()
    cut = train(command(data, tmp_path, *common, *taught, "batch.micro=1", name="cut"))
    again = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


def test_what_it_refuses(models: Any) -> None:
    for wrong, message in (
        ({"divergence": "js"}, "divergence: got 'js'; allowed: forward, reverse"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk": 0}, "chunk=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Distillation(**wrong)  # type: ignore[arg-type]
