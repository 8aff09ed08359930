"""Values of a configuration as plain Python."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException


def resolved(parent: Any, key: Any) -> Any:
    """The content of one key as plain Python; `???` stands for what is missing or cannot be resolved."""
    try:
        node = parent[key]
    except OmegaConfBaseException:
        return "???"
    if isinstance(node, DictConfig):
        return {str(inner): resolved(node, inner) for inner in node}
    if isinstance(node, ListConfig):
        return [resolved(node, index) for index in range(len(node))]
    return node
