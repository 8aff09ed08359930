"""A component to check: its options as its file has them, small ones, and what holds for every component."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vlm_train.build import instantiate_part
from vlm_train.check.check import check_foreign_targets, check_targets
from vlm_train.config.auto import list_auto
from vlm_train.config.compose import compose_config
from vlm_train.config.schema import DICT_GROUPS
from vlm_train.config.signatures import import_target
from vlm_train.config.size import SIZED_GROUPS
from vlm_train.contract.finding import Finding

DOCSTRING = "has a docstring"
"""The check of files that ends no others: it says nothing of what a component computes."""

METRICS = "eval"
"""Where a component of the group `metric` is composed: that group has no place of its own."""


@dataclass(frozen=True)
class Component:
    """An option of a group, `group=name`.

    Attributes:
        written: the whole configuration that it was chosen in, as its files have it.
        small: the same with `size=tiny`.
    """

    group: str
    name: str
    written: DictConfig
    small: DictConfig

    def copy_options(self, *, written: bool = False) -> Any:
        """The options of a group that holds one component; weights that a user has to give are null."""
        as_written = written and "config" not in list_auto(self.written[self.group])  # else it is what its source says
        node = (self.written if as_written else self.small)[self.group].copy()
        if OmegaConf.is_missing(node, "weights"):
            node.weights = None
        return node

    def make_small(self, **given: Any) -> Any:
        """A new small object of it, without the weights of files."""
        return instantiate_part(self.group, self.copy_options(), **given)

    def make_on_meta(self, **given: Any) -> Any:
        """One as its file has it, on the meta device."""
        with torch.device("meta"):
            return instantiate_part(self.group, self.copy_options(written=True), **given)


def compose_component(
    group: str, name: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]
) -> tuple[DictConfig, list[Finding]]:
    """The configuration with `group=name`, as written, and what is wrong with the component's files."""
    chosen = f"+metric@{METRICS}.{name}={name}" if group == "metric" else f"{group}={name}"
    written = compose_config([*overrides, chosen, "dry_run=true"], config_dirs)
    path = f"{METRICS}.{name}" if group == "metric" else group
    return written, [*_check_files(written, group, path)]


def shrink_component(
    group: str, name: str, written: DictConfig, overrides: Sequence[str], config_dirs: Sequence[str | Path]
) -> Component:
    """The component with its small twin."""
    if group == "metric":
        return Component(group, name, written, written)
    return Component(group, name, written, compose_config([*overrides, f"{group}={name}", "size=tiny"], config_dirs))


def _check_files(cfg: DictConfig, group: str, path: str) -> Iterator[Finding]:
    below = (path, f"{path}.")
    blocks = [str(place) for place in cfg.tiny]
    cfg.tiny = {}  # they hold options that size=tiny replaces
    problems = [one for one in check_targets(cfg) if one.startswith(below)]
    problems = problems or [one for one in check_foreign_targets(cfg) if one.startswith(below)]
    yield Finding("its YAML names a class that exists, and options that it takes", "; ".join(problems))
    if problems:
        return
    node = OmegaConf.select(cfg, path)
    nodes = node.values() if group in DICT_GROUPS else [node]
    targets = [one._target_ for one in nodes if one is not None]
    silent = [target for target in targets if not inspect.isfunction(import_target(target)) and not _says_what(target)]
    yield Finding(DOCSTRING, f"{', '.join(silent)} has none: say in a sentence what it does" if silent else "")
    if group in SIZED_GROUPS:
        lacks = not any(place.partition(".")[0] == group for place in blocks)
        advice = "its YAML has none. Add the values that make it small, or `tiny: {}` if nothing of it is large"
        yield Finding("has a `tiny:` block for size=tiny", advice if lacks else "")


def _says_what(target: str) -> bool:
    """A class without a docstring of its own has None, or the text that dataclasses make of its fields."""
    found = import_target(target)
    text = found.__doc__ or ""
    return bool(text.strip()) and not text.startswith(f"{found.__name__}(")
