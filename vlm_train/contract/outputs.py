"""Metrics, evaluators, exporters and importers keep the contracts of `vlm_train.contracts.evaluator` and `exporter`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vlm_train.build import (
    Assembly,
    build_assembly,
    build_evaluators,
    build_exporters,
    build_importers,
    build_model,
    build_tokenizer,
    make_each,
)
from vlm_train.check.model import check_evaluators
from vlm_train.contract.component import METRICS, Component
from vlm_train.contract.finding import Finding, compare_values, require_members
from vlm_train.contract.samples import write_samples
from vlm_train.contracts.evaluator import Evaluator, Findings
from vlm_train.contracts.exporter import Exporter
from vlm_train.contracts.family import PredictsTokens
from vlm_train.evaluation.run import run_evaluator

REFERENCES = (("a cat", "one cat"), ("Stop",))
RIGHT, WRONG = ("one cat", "Stop"), ("dogs", "")


def check_metric(component: Component) -> Iterator[Finding]:
    """A metric of texts, `TextMetric`."""
    node = OmegaConf.select(component.small, f"{METRICS}.{component.name}")
    metric = make_each(METRICS, OmegaConf.create({component.name: node}))[component.name]
    yield (found := require_members(metric, ("higher_is_better", "__call__")))
    if found.problem:
        return
    right, again, wrong = (metric(list(texts), REFERENCES) for texts in (RIGHT, RIGHT, WRONG))
    if not isinstance(right, dict):
        yield Finding("returns values by name", f"got {right!r}")
        return
    declared = list(metric.higher_is_better)
    yield compare_values(
        "returns the values that higher_is_better declares", (list(right), list(wrong)), (declared, declared)
    )
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (*right.values(), *wrong.values()))
    yield Finding("every value is a finite float", "" if numbers else f"got {right} and {wrong}")
    yield compare_values("the same texts give the same values", again, right)
    for name, higher in metric.higher_is_better.items():
        best, worst = right.get(name, 0.0), wrong.get(name, 0.0)
        problem = (
            "" if (best >= worst) is higher or best == worst else f"{best} for right texts, {worst} for wrong ones"
        )
        yield Finding(f"{name}: {'higher' if higher else 'lower'} is better, as declared", problem)


def check_eval(component: Component) -> Iterator[Finding]:
    """Every evaluator of an option, with the model of its configuration: `Evaluator`."""
    written = build_evaluators(component.written)
    for name, evaluator in written.items():
        yield require_members(evaluator, [member for member in vars(Evaluator) if not member.startswith("_")])
        directions = dict(evaluator.higher_is_better)
        known = "" if evaluator.primary in directions else f"got {evaluator.primary!r}, one of {', '.join(directions)}"
        yield Finding(f"{name}: says whether higher is better for its primary metric", known)

    cfg = component.small
    with tempfile.TemporaryDirectory() as place:
        sets = {texts: write_samples(Path(place) / f"shards-{texts}", texts=texts) for texts in (False, True)}
        folders = {name: sets[PredictsTokens in getattr(one, "needs", ())] for name, one in written.items()}
        nodes = _put_shards(component.written.eval, folders)
        evaluators = make_each("eval", OmegaConf.create(nodes))
        problems = list(check_evaluators(evaluators, _make_skeleton(cfg)))
        advice = " Add recipe=<one whose model does>." if problems else ""
        yield Finding("the model offers what it needs", "; ".join(problems) + advice)
        if problems:
            return
        built = build_assembly(cfg)
        for name, evaluator in evaluators.items():
            for final in (False, True):
                found = run_evaluator(name, evaluator, built.model, built.processor, Path(place), final=final)
                when = "after training" if final else "at validations"
                good = isinstance(found, Findings) and bool(found.metrics)
                yield Finding(f"{name}: finds what it declares {when}", "" if good else f"got {found}")


def check_exporter(component: Component) -> Iterator[Finding]:
    """The exporters of an option: each says what it cannot express, and what one writes it reads back."""
    cfg = component.small
    skeleton, exporters = _make_skeleton(cfg), build_exporters(cfg)
    problems = {name: one.problems(skeleton) for name, one in exporters.items()}
    for name, found in problems.items():
        texts = isinstance(found, list) and all(isinstance(one, str) for one in found)
        yield Finding(
            f"{name}: says what it cannot express, of a model without weights", "" if texts else f"got {found}"
        )
    able = [name for name, found in problems.items() if not found]
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in problems.items())
    yield Finding("one of them can write the model", "" if able else f"{reasons}. Add recipe=<one that it can write>.")
    if able:
        yield from _check_export(able[0], exporters[able[0]], build_assembly(cfg))


def _check_export(name: str, exporter: Exporter, built: Assembly) -> Iterator[Finding]:
    model = built.model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        said = exporter.write(model, built.processor, Path(place))
        problem = "" if isinstance(said, str) and any(Path(place).iterdir()) else f"returned {said!r}, wrote nothing"
        yield Finding(f"{name}: writes files, and says in words what they have", problem)
        with torch.no_grad():
            difference = exporter.verify(model, Path(place))
    small = isinstance(difference, float) and 0 <= difference <= 1e-3
    yield Finding(f"{name}: reads them back and computes the same", "" if small else f"differs by {difference}")
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    yield compare_values(f"{name}: leaves the model as it is (weights that changed)", changed[:3], [])


def check_importer(component: Component) -> Iterator[Finding]:
    """Every importer of an option refuses a folder that is not of its format: `Importer`."""
    with tempfile.TemporaryDirectory() as place:
        for name, one in build_importers(component.written).items():
            found = one.problems(Path(place))
            good = isinstance(found, list) and bool(found) and all(isinstance(text, str) for text in found)
            yield Finding(f"{name}: says why it cannot read an empty folder", "" if good else f"got {found!r}")


def _put_shards(nodes: Any, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The evaluators, with a made shard set each in place of all that they name."""

    def replace_shards(key: str, value: Any, folder: Path) -> Any:
        if not key.endswith("shards") or value is None:
            return value
        return [str(folder)] if isinstance(value, list) else str(folder)

    plain = OmegaConf.to_container(nodes, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    return {
        str(name): {str(key): replace_shards(str(key), value, folders[str(name)]) for key, value in node.items()}
        for name, node in plain.items()
        if node is not None
    }


def _make_skeleton(cfg: DictConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        return build_model(cfg, build_tokenizer(cfg), meta=True)
