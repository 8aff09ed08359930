"""Overlays of `size`: they change numbers that a component has, under whichever of their names, and add none."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

NUMBERS = "config"
"""Key of the architecture numbers, whose names differ between the components of a group."""


def fitting(overlay: Any, node: DictConfig) -> DictConfig:
    """What `overlay` says of the keys that `node` has; an empty node inside takes all of its part."""
    kept = {key: value for key, value in overlay.items() if key in node}
    for key, value in kept.items():
        if OmegaConf.is_dict(value) and OmegaConf.is_dict(node[key]) and len(node[key]):
            kept[key] = fitting(value, node[key])
    return OmegaConf.create(kept)


def take_back(node: Any, option: Path, overlay: Path, asked: Container[str]) -> None:
    """Removes from `node`, where Hydra has laid `overlay` over `option`, the architecture numbers that only the overlay
    has. Those that the command line names (`asked`, full keys) stay, to be found wrong. An option of the user's own,
    elsewhere than ours, keeps the overlay as it is, and so does one without numbers of its own."""
    if not (option.is_file() and overlay.is_file()):
        return
    own, said = (OmegaConf.select(OmegaConf.load(path), NUMBERS) for path in (option, overlay))
    if not own or said is None:
        return
    with open_dict(node):
        for key in set(said) - set(own):
            if f"{option.parent.name}.{NUMBERS}.{key}" not in asked:
                node[NUMBERS].pop(key, None)
