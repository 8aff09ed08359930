"""Columns beside the shards: they are there, and what they say was computed of what the run shows its model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipelines.shards.columns import COLUMNS, read_manifest
from vlm_train.config.resolve import resolve_key
from vlm_train.contracts.objective import list_columns

SEEN = ("template", "image")
"""Groups that decide what a model sees of a sample, besides some settings of `data`."""


def check_columns_beside(path: str, cfg: DictConfig, objective: Any) -> Iterator[str]:
    """Every shard set of the run has the columns beside it that an objective reads."""
    columns = list_columns(objective)
    for split in ("train", "val") if columns else ():
        for index, entry in enumerate(resolve_key(cfg.data, split) or []):
            where = f"data.{split}.{index}.columns"
            if (folder := entry.get("columns")) is None:
                yield f"{path}: reads the columns {', '.join(columns)}. Set {where}=<folder>; it is not given."
            elif (Path(folder) / COLUMNS).is_file():  # a missing one is told with the other missing files
                manifest = read_manifest(Path(folder), where)
                for name in (name for name in columns if name not in manifest.names):
                    yield f"{path}: reads the column {name!r}. {where}: {folder} has {', '.join(manifest.names)}."
                if getattr(objective, "top_tokens", ()) and "top_k" not in manifest.about:
                    yield f"{where}: {folder} holds no top tokens. Write them by columns.scores=teacher."
                for differing in _list_differing(cfg, objective, manifest.about):
                    yield (
                        f"{where}: {folder} was computed with another {differing}. Write it again by mode=score with "
                        "this run's, or train with those."
                    )


def _list_differing(cfg: DictConfig, objective: Any, about: Mapping[str, Any]) -> Iterator[str]:
    """Settings that `mode=score columns.scores=answers` or `teacher` noted and that are others now; columns of others
    note none."""
    if "data" not in about:
        return
    now = json.loads(json.dumps({name: resolve_key(cfg, name) for name in (*SEEN, "data")}))
    for name in SEEN:
        if about[name] != now[name]:
            yield name
    for name, value in about["data"].items():
        if now["data"].get(name) != value:
            yield f"data.{name} ({value!r})"
    for name in (name for name in ("gamma", "temperature") if name in about):
        if about[name] != getattr(objective, name, None):
            yield f"columns.{name} ({about[name]!r})"
