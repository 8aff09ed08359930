"""Runs the configured evaluators: at validations, after training and by `mode=eval`, and records what they find."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlm_train.config.resolve import resolve_key
from vlm_train.config.run_file import load_run
from vlm_train.config.run_identity import run_dir
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.contracts.evaluator import Evaluator, Findings
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import trained_precision
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder, require_writable

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.processor import Processor


BEFORE = "before this run"
"""What tables call the values that a run began with."""


def evaluate_run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate the run in `run_dir(cfg)`. Returns `<label>/<metric>` -> value."""
    import torch

    from vlm_train.build import build_assembly, build_evaluators, build_on_meta
    from vlm_train.check.model import check_evaluators
    from vlm_train.checkpoint.weights import load_run_weights
    from vlm_train.report import results_table

    evaluators = build_evaluators(cfg)
    if not evaluators:
        raise ConfigError("eval: no evaluator is configured. Choose one, for example eval=easyvqa.")
    folder = run_dir(cfg)
    require_own_weights(cfg, folder)
    require_writable(folder)
    labels = labels_of(cfg, folder)
    skeleton = build_on_meta(cfg)
    if skeleton is not None and (problems := list(check_evaluators(evaluators, skeleton))):
        raise ConfigError(problems)
    assembly = build_assembly(cfg)
    load_run_weights(assembly.model, cfg.init_from, folder)
    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        assembly.model.to("cuda")
    metrics = run_evaluators(assembly.model, assembly.processor, evaluators, folder, labels)
    if process_rank() == 0:
        print(results_table(folder))
    return metrics


def run_evaluator(
    name: str, evaluator: Evaluator, model: nn.Module, processor: Processor, folder: Path, *, final: bool
) -> Findings:
    """Run one evaluator. Values that are no finite number are named and left out.

    Raises:
        ConfigError: it found a metric that it does not declare, or another direction.
    """
    with trained_precision(model):
        findings = evaluator.run(model, processor, folder, final=final)
    declared, found = dict(evaluator.higher_is_better), dict(findings.higher_is_better)
    if (declared, evaluator.primary) != (found, findings.primary):
        raise ConfigError(
            f"eval.{name}: declares {declared} with the primary metric {evaluator.primary}, "
            f"but found {found} with {findings.primary}"
        )
    kept = findings.without_undefined()
    for metric in findings.metrics.keys() - kept.metrics.keys() if process_rank() == 0 else ():
        print(f"eval.{name}: {metric} is {findings.metrics[metric]} and left out", flush=True)
    return kept


def evaluate_before(
    model: nn.Module, processor: Processor, evaluators: Mapping[str, Evaluator], folder: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run every evaluator as at the end, into `folder/<name>/before`, before a run has learned anything.

    Returns:
        `<name>/<metric>` -> value, and the rows for the results table.
    """
    metrics: dict[str, float] = {}
    rows = []
    for name, evaluator in evaluators.items():
        found = run_evaluator(name, evaluator, model, processor, folder / name / "before", final=True)
        metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
        own = [row for row in found.rows if row.name == found.rows[0].name]
        rows += [asdict(replace(row, name=BEFORE)) | {"eval": name} for row in own]
    return metrics, rows


def describe_evaluators(evaluators: Mapping[str, Evaluator], labels: Mapping[str, str]) -> dict[str, Any]:
    """What `run.json` says of each evaluation under its label: which metric is primary, and their directions."""
    return {
        labels[name]: {"primary": one.primary, "higher_is_better": dict(one.higher_is_better)}
        for name, one in evaluators.items()
    }


def run_evaluators(
    model: nn.Module,
    processor: Processor,
    evaluators: Mapping[str, Evaluator],
    folder: Path,
    labels: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Run every evaluator for good, into `folder/eval/<label>`, and add the results to the run's record.

    Returns:
        `<label>/<metric>` -> value.
    """
    labels = labels or {name: name for name in evaluators}
    found = {
        name: run_evaluator(name, one, model, processor, RunFolder(folder).evaluation / labels[name], final=True)
        for name, one in evaluators.items()
    }
    earlier = record.read_record(folder).get("results_before") or []
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        for row in one.rows:
            own = asdict(row) | {"eval": labels[name]}
            before = [other for other in earlier if (other["eval"], other["metric"]) == (labels[name], row.metric)]
            rows += [own, *before] if row.name == one.rows[0].name else [own]
    metrics = {f"{labels[name]}/{key}": value for name, one in found.items() for key, value in one.metrics.items()}
    if process_rank() == 0:
        official = {name for name, label in labels.items() if name == label}
        save_results(folder, rows, metrics, describe_evaluators(evaluators, labels), official)
    return metrics


DECIDE_WEIGHTS = ("seed", "init_from", "model", *MODEL_PARTS, "parts", "peft")
"""Keys that decide the weights that a run's checkpoint lacks: those of its frozen parts."""

SEEN = ("tokenizer", "template", "image")
"""Groups that decide, besides the evaluator's own options and the weights, what an evaluation finds."""


def require_own_weights(cfg: DictConfig, folder: Path) -> None:
    """Raises ConfigError for every key that would give the run in `folder` other weights than its own.

    `weights` may name another place, for they may have moved, and `attention` another kernel.
    """
    now, own = cfg.copy(), load_run(folder)
    for one in (now, own):
        for name in one.paths:
            one.paths[name] = name  # folders may have moved, too
    keys = [
        key
        for group in DECIDE_WEIGHTS
        for key in _differing_keys(group, resolve_key(now, group), resolve_key(own, group))
    ]
    if keys:
        where = f"If a folder has moved, change {RunFolder(folder).config}."
        raise ConfigError([f"{key}: decides the weights of this run; leave it out. {where}" for key in keys])


def _differing_keys(key: str, now: Any, own: Any) -> Iterator[str]:
    """The dotted keys at and below `key` where the two differ in what decides weights."""
    name = key.rpartition(".")[2]
    if isinstance(now, dict) and isinstance(own, dict):
        for inner in sorted(now.keys() | own.keys()):
            yield from _differing_keys(f"{key}.{inner}", now.get(inner), own.get(inner))
    elif now != own and name != "attention" and not (name == "weights" and now and own):
        yield key


def labels_of(cfg: DictConfig, folder: Path) -> dict[str, str]:
    """What to call each evaluation: its name if the run itself is configured so, else `<name>-<hash of the options>`.

    One label stands for one way of evaluating, so that results of a few samples never replace those of all.
    """
    own = load_run(folder)
    changed = {group: resolve_key(cfg, group) for group in SEEN if resolve_key(cfg, group) != resolve_key(own, group)}
    copy = {"_target_": "vlm_train.data.text.tokenizer.pretrained", "name": str(RunFolder(folder).tokenizer)}
    if changed.get("tokenizer") == copy:  # as `run=` sets it
        del changed["tokenizer"]
    nodes, ours = resolve_key(cfg, "eval") or {}, resolve_key(own, "eval") or {}
    labels = {}
    for name, node in nodes.items():
        text = json.dumps([node, changed], sort_keys=True, default=str)
        same = node == ours.get(name) and not changed
        labels[name] = name if same else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return labels


def save_results(
    folder: Path,
    rows: list[dict[str, Any]],
    metrics: Mapping[str, float],
    evaluators: Mapping[str, Any],
    official: Collection[str],
) -> None:
    """Put results into `run.json`, in place of earlier ones of the same label, and renew the report.

    Args:
        rows: of the results table; those of `official` labels come first.
        evaluators: as `describe_evaluators` has them.
    """
    from vlm_train.report import write_report

    before = record.read_record(folder)
    kept = [row for row in before.get("results") or [] if row.get("eval") not in evaluators]
    first = [row for row in rows if row["eval"] in official]
    results = [*first, *kept, *(row for row in rows if row["eval"] not in official)]
    stale = tuple(f"{label}/" for label in evaluators)
    others = {name: value for name, value in (before.get("metrics") or {}).items() if not name.startswith(stale)}
    described = {**(before.get("evaluators") or {}), **evaluators}
    record.update_record(folder, results=results, metrics={**others, **metrics}, evaluators=described)
    write_report(folder)
