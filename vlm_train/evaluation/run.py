"""`mode=eval`: runs the configured evaluators on a trained run and adds their results to its record and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlm_train.config import run_dir
from vlm_train.errors import ConfigError
from vlm_train.launch import rank

if TYPE_CHECKING:
    from vlm_train.build import Built


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the run in `run_dir(cfg)`; returns `results` (table rows) and each evaluator's findings by name."""
    import torch

    from vlm_train.build import build
    from vlm_train.checkpoint import load_run_weights
    from vlm_train.report import results_table

    evaluators = make_evaluators(cfg)
    if not evaluators:
        raise ConfigError("eval: no evaluator is configured. Choose one, for example eval=easyvqa.")
    folder = run_dir(cfg)
    built = build(cfg)
    load_run_weights(built.model, cfg.init_from, folder)
    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        built.model.to("cuda")
    found = run_evaluators(built, evaluators, folder)
    if rank() == 0:
        print(results_table(folder))
    return found


def make_evaluators(cfg: DictConfig) -> dict[str, Any]:
    """Name -> evaluator, as `eval` configures them; a null one is left out."""
    from hydra.utils import instantiate

    nodes = cfg.eval or {}
    return {str(name): instantiate(nodes[name], _convert_="all") for name in nodes if nodes[name] is not None}


def run_evaluators(built: Built, evaluators: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run every evaluator for good, into `folder/eval/<name>`, and save the results of all in the run's record."""
    found = {name: one.run(built, folder / "eval" / name, final=True) for name, one in evaluators.items()}
    rows = [row for one in found.values() for row in one["results"]]
    if rank() == 0:
        save_results(folder, rows)
    return {**found, "results": rows}


def save_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Put `rows` into `run.json` as `results` and write the report anew."""
    from vlm_train.report import write_report

    path = folder / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"run_id": folder.name}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record | {"results": rows}, indent=2), encoding="utf-8")
    partial.replace(path)
    write_report(folder)
