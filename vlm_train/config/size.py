"""`size=tiny`: what makes a component small enough for a CPU stands in its own YAML, under `tiny:`.

The block is laid over its component; a block with a `_target_` replaces it. Every composed configuration has its blocks
taken out: they reach neither constructors nor the run id.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from vlm_train.config.auto import fill_auto
from vlm_train.config.schema import MODEL_PARTS, PART_GROUPS
from vlm_train.config.trust import check_extended_trust
from vlm_train.errors import ConfigError

TINY = "tiny"
"""Name of the block, and of the option of the group `size`."""

SIZED_GROUPS = (*MODEL_PARTS, "parts", "tokenizer", "instruction", "data")
"""Groups whose components need a block; `tiny: {}` says that nothing of a component is large."""


def list_unsized(cfg: DictConfig, blocks: Mapping[str, Any], groups: Iterable[str] = SIZED_GROUPS) -> list[str]:
    """The components of `groups` that have no block, nor any inside them, as dotted paths."""
    found = []
    for group in groups:
        node = cfg._get_node(group)
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            continue
        single = "_target_" in node
        members = {group: node} if single else {f"{group}.{name!s}": node._get_node(name) for name in node}
        found += [path for path, one in members.items() if isinstance(one, DictConfig) and "_target_" in one]
    return [path for path in found if not any(f"{block}.".startswith(f"{path}.") for block in blocks)]


def take_blocks(cfg: DictConfig) -> dict[str, Any]:
    """Remove the `tiny:` blocks of all components, nested ones too -> dotted path of the component: its block."""
    return {
        path: block for group in (*PART_GROUPS, "parts") for path, block in _take_blocks(cfg._get_node(group), group)
    }


def _take_blocks(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key in list(node):
        if key != TINY:
            yield from _take_blocks(node._get_node(key), f"{path}.{key}")
    if TINY in node:
        with open_dict(node):
            yield path, node.pop(TINY) or {}


def shrink(cfg: DictConfig, blocks: Mapping[str, Any]) -> None:
    """Lay `blocks` (see `take_blocks`) over their components in `cfg`, inner ones first."""
    for path, block in sorted(blocks.items(), key=lambda item: -item[0].count(".")):
        small = block
        if "_target_" not in block:
            with open_dict(cfg):
                small = OmegaConf.merge(OmegaConf.select(cfg, path), block)
        OmegaConf.update(cfg, path, small, merge=False)


def apply_tiny(
    cfg: DictConfig,
    blocks: Mapping[str, Any],
    choices: Mapping[str, Any],
    overrides: Iterable[str],
    decided: Collection[str] = (),
) -> None:
    """`size=tiny`: shrink every component of `cfg`; what the command line says of one stands on top, but for the
    options `decided`, see `fill_auto`.

    Raises:
        ConfigError: a component without a block, or a value for an option that a replaced component does not have.
    """
    if missing := list_unsized(cfg, blocks):
        raise ConfigError(
            [
                f"size=tiny: {f'{path}={choices[path]}' if path in choices else path} has no `tiny:` block. Add one to "
                "its file: the values that make it small, or `tiny: {}` if nothing of it is large."
                for path in missing
            ]
        )
    shrink(cfg, blocks)
    for group in {path.partition(".")[0] for path in blocks}:
        for override in values_below(group, overrides):
            if override.key_or_group not in decided:
                _put_back(cfg, group, override)


def values_below(group: str, overrides: Iterable[str]) -> list[Override]:
    """The command line's values, not choices, below a group, besides those of its `tiny:` blocks."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [(override, override.key_or_group.split(".")) for override in parsed]
    return [override for override, (first, *rest) in keys if first == group and rest and TINY not in rest]


def _put_back(cfg: DictConfig, group: str, override: Override) -> None:
    """Apply a value of the command line once more."""
    key, line = override.key_or_group, str(override.input_line)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    if line.startswith("~"):
        if OmegaConf.is_dict(node):
            node.pop(name, None)
    elif line.startswith("+") or (OmegaConf.is_dict(node) and name in node) or OmegaConf.is_list(node):
        OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
    else:
        known = ", ".join(str(other) for other in cfg[group] if other != "_target_")
        raise ConfigError(f"{key}: {group} has no such option under size=tiny. Options: {known}.")


def finish_config(cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str] = ()) -> DictConfig:
    """Names the configuration after its recipe, reads what is `auto`, makes parts small under `size=tiny`, and pins its
    folders to the directory the command was started in."""
    check_extended_trust(cfg, overrides)
    blocks = take_blocks(cfg)
    decided = fill_auto(cfg, blocks)
    if choices.get("size") == TINY:
        apply_tiny(cfg, blocks, choices, overrides, decided)
    if cfg.dry_run:
        cfg.tiny = blocks
    if cfg.recipe_name == "custom" and choices.get("recipe"):
        cfg.recipe_name = Path(str(choices["recipe"])).name
    if empty := [f"paths.{name}: expected a folder, got ''." for name in cfg.paths if not cfg.paths[name]]:
        raise ConfigError(empty)
    for name in cfg.paths:
        cfg.paths[name] = os.path.abspath(os.path.expanduser(cfg.paths[name]))
    return cfg
