"""Values of a configuration as plain Python."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException


def resolve_key(parent: Any, key: Any) -> Any:
    """The content of one key as plain Python; `???` stands for what is missing or cannot be resolved."""
    try:
        node = parent[key]
    except OmegaConfBaseException:
        return "???"
    if isinstance(node, DictConfig):
        return {str(inner): resolve_key(node, inner) for inner in node}
    if isinstance(node, ListConfig):
        return [resolve_key(node, index) for index in range(len(node))]
    return node
