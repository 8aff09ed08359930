"""Components under the names that earlier versions gave them: run folders hold these, and people's own YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    module, _, name = target.rpartition(".")
    moved = f"{_table()[module]}.{name}" if module in _table() else target
    now = _table().get(moved, moved)  # a component may have moved with its module, and then got a name of its own
    return None if now == target else now


def restore_first_targets(value: Any) -> Any:
    """Plain configuration with the names that moved and renamed components first had: for hashes that outlive both."""
    return _replace_targets(value, _first_target)


@cache
def _first_names() -> Mapping[str, str]:
    """New name -> the first old name that the table has for it."""
    found: dict[str, str] = {}
    for old, now in _table().items():
        found.setdefault(now, old)
    return found


def _first_target(target: Any) -> str | None:
    """What the component of today's name was first called, in the module that it was first in."""
    if not isinstance(target, str):
        return None
    module, _, name = _first_names().get(target, target).rpartition(".")
    return f"{find_first_module(module)}.{name}"


def find_first_module(module: str) -> str:
    """The name under which a module of today first stood; other modules keep theirs."""
    return _first_names().get(module, module)


def rename_targets(cfg: DictConfig | ListConfig) -> DictConfig | ListConfig:
    """The configuration with today's names of components; interpolations are kept."""
    return OmegaConf.create(_replace_targets(OmegaConf.to_container(cfg, resolve=False), moved_target))


def _replace_targets(value: Any, name_of: Callable[[Any], str | None]) -> Any:
    if isinstance(value, dict):
        inner = {key: _replace_targets(one, name_of) for key, one in value.items()}
        if name := name_of(inner.get("_target_")):
            inner["_target_"] = name
        return inner
    return [_replace_targets(one, name_of) for one in value] if isinstance(value, list) else value
