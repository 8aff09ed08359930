"""Components under the names that earlier versions gave them: run folders hold these, and people's own YAML."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf


@cache
def _table() -> Mapping[str, str]:
    """Old name -> new name, of a module or of one component."""
    loaded = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))
    assert isinstance(loaded, dict)
    return {str(old): str(new) for old, new in loaded.items()}


def moved_target(target: Any) -> str | None:
    """What the component of an old name is called now; None for every other name."""
    if not isinstance(target, str):
        return None
    if target in _table():
        return _table()[target]
    module, _, name = target.rpartition(".")
    return f"{_table()[module]}.{name}" if module in _table() else None


def rename_targets(cfg: DictConfig | ListConfig) -> DictConfig | ListConfig:
    """The configuration with today's names of components; interpolations are kept."""
    return OmegaConf.create(_renamed(OmegaConf.to_container(cfg, resolve=False)))


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        inner = {key: _renamed(one) for key, one in value.items()}
        if now := moved_target(inner.get("_target_")):
            inner["_target_"] = now
        return inner
    return [_renamed(one) for one in value] if isinstance(value, list) else value
