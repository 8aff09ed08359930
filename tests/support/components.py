"""Components of `conf/` as a run gets them: what they extend is filled in, their `tiny:` blocks are taken out."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from vlm_train.config.compose import compose_config
from vlm_train.config.folders import config_dir


def options(group: str) -> list[str]:
    """Names of a group's components."""
    files = (config_dir() / group).glob("*.yaml")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def component(group: str, option: str, *, tiny: bool = False) -> Any:
    """The configuration of one component; weights that a user has to give are null."""
    node = _compose(group, option, tiny).copy()
    if OmegaConf.is_missing(node, "weights"):
        node.weights = None
    return node


@cache
def _compose(group: str, option: str, tiny: bool) -> Any:
    return compose_config([f"{group}={option}", *(["size=tiny"] if tiny else [])])[group]
