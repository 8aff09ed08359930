"""Feature distillation equals its formula, value and gradients; its teacher stays, and grids must agree."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.shards.shard_set import ShardSet
from tests.support.small_run import command, make_data, train
from vlm_train.build import build_assembly
from vlm_train.checkpoint.weights import weights_file
from vlm_train.config.compose import compose_config
from vlm_train.contracts.media import Features, Grid3
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import outputs_of
from vlm_train.objectives.distill_features import FeatureDistillation
from vlm_train.training.reference import frozen

WIDER = "vision.config.hidden_size=48"
PROJECTED = ["parts=feature_projection", "parts.feature_projection.teacher_dim=48"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("features"), text_only=True)


class Case:
    """A student, a teacher with other weights, and batches of all samples and of those without pictures."""

    def __init__(self, data: Path, runs: Path, *, wider: bool) -> None:
        built, other = (
            build_assembly(compose_config(command(data, runs, *more)))
            for more in ((PROJECTED if wider else []), ([WIDER] if wider else []))
        )
        self.student: Any = built.model.eval().requires_grad_(True)
        self.teacher: Any = other.model.eval().requires_grad_(False)
        with torch.no_grad():
            for weight in self.teacher.parameters():
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
                weight.add_(noise * 0.1)
        processor, rows = built.processor, []
        for sample, blobs in ShardSet(data / "tiny/val"):
            rows.append([Example(processor.render(sample), processor.make_views(blobs, media=sample.media))])
        self.batch = collate_rows(rows, processor.images)
        self.text_only = collate_rows(rows[1::2], processor.images)
        self.padding = collate_rows([], processor.images)
        self.context = StepContext(reference=partial(frozen, self.teacher))

    def run(self, batch: Any, **settings: Any) -> Any:
        batch.shared.clear()
        self.student.zero_grad()
        found = FeatureDistillation(**settings)(self.student, batch, self.context)["features"]
        found.sum.backward()
        return found


@pytest.fixture(scope="module", params=[False, True], ids=["one width", "projected"])
def case(request: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(data, tmp_path_factory.mktemp("runs"), wider=request.param)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_it_is_the_formula(case: Case, distance: Any) -> None:
    student, teacher, batch = case.student, case.teacher, case.batch
    student.zero_grad()
    own = student.vision.encode(batch.media.inputs["vision"]).rectangular()  # [N, P, D]
    told = teacher.vision.encode(batch.media.inputs["vision"]).rectangular()
    if student.feature_projection is not None:
        linear = student.feature_projection.linear
        own = own @ linear.weight.T + linear.bias
    assert own.shape == told.shape and len(own) == 2  # of four samples two have no picture
    if distance == "cosine":
        each = 1 - (own * told).sum(-1) / (own.square().sum(-1) * told.square().sum(-1)).sqrt()
    else:
        each = ((own - told) ** 2).mean(-1)
    expected = each.mean(dim=1).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert len(gradients) > 5 and all(name.startswith(("vision.", "feature_projection.")) for name in gradients)
    found = case.run(batch, distance=distance)
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 1e-3
    assert found.count == 4
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, weight in student.named_parameters():
        if name in gradients:
            least = 1e-6 * largest  # biases of keys, which no softmax sees: their gradient is rounding
            assert (weight.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max() + least, name
    assert all(weight.grad is None for weight in teacher.parameters())


def test_samples_without_pictures_add_nothing_and_reach_the_same_weights(case: Case) -> None:
    case.run(case.batch)
    reached = {name for name, p in case.student.named_parameters() if p.grad is not None}
    found = case.run(case.text_only)
    assert found.sum == 0 and found.count == 2
    assert {name for name, p in case.student.named_parameters() if p.grad is not None} == reached
    assert all(not p.grad.any() for p in case.student.parameters() if p.grad is not None)
    assert case.run(case.padding).count == 0 and case.run(case.padding).sum == 0


def test_the_encoder_runs_once_for_this_loss_and_the_language_model(case: Case, monkeypatch: Any) -> None:
    calls: list[str] = []
    encode = type(case.student.vision).encode

    def count_call(tower: Any, media: Any) -> Any:
        calls.append("student" if tower is case.student.vision else "teacher")
        return encode(tower, media)

    monkeypatch.setattr(type(case.student.vision), "encode", count_call)
    case.run(case.batch)
    outputs_of(case.student, case.batch, "llm")
    assert sorted(calls) == ["student", "teacher"]


def test_other_grids_and_widths_are_refused(case: Case) -> None:
    class Cut:
        """A teacher that sees a row of patches less."""

        def encode_patches(self, batch: Any) -> Features:
            whole = case.teacher.encode_patches(batch)
            grid = Grid3(1, whole.grids[0].h - 1, whole.grids[0].w)
            return Features.from_rectangular(whole.rectangular()[:, : grid.size], grid)

    case.batch.shared.clear()
    with pytest.raises(ConfigError, match=r"teacher's encoder has \(1, \d, \d\) features a view .* the student's \(1,"):
        FeatureDistillation()(case.student, case.batch, StepContext(reference=partial(frozen, Cut())))
    narrow = copy.deepcopy(case.student)
    narrow.feature_projection = torch.nn.Linear(narrow.vision.out_dim, 7)
    case.batch.shared.clear()
    width = case.teacher.vision.out_dim
    with pytest.raises(ConfigError, match=f"have width {width}, the student's 7. Use parts.feature_proj.*_dim={width}"):
        FeatureDistillation()(narrow, case.batch, case.context)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="distance: got 'l1'; allowed: cosine, mse"):
        FeatureDistillation(distance="l1")  # type: ignore[arg-type]


def test_a_run_comes_closer_to_its_teacher_which_stays(data: Path, tmp_path: Path) -> None:
    common = ["params=all", "trainer.export=false"]
    teacher = train(command(data, tmp_path, *common, WIDER, name="teacher"))
    before = load_file(weights_file(teacher, "last"))
    taught = ["objective=distill_features", f"reference.model={teacher}", *PROJECTED, "optim.lr=0.01", "seed=7"]
    taught += ["trainer.max_steps=20", "trainer.save_every=null", "trainer.log_every=1"]
    runs = [
        train(command(data, tmp_path, *common, *taught, f"batch.micro={micro}", name=f"student{micro}"))
        for micro in (4, 1)
    ]
    whole, cut = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    losses = [row["features_loss"] for row in whole if row["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0] and "lm_loss" in whole[0]
    assert [row["loss"] for row in cut] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    after = load_file(weights_file(teacher, "last"))
    assert all(torch.equal(before[name], after[name]) for name in before)
