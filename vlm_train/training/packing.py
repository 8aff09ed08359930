"""Whether samples may share rows, where only the model itself can tell."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from vlm_train.distributed import say_once
from vlm_train.errors import ConfigError


def settle_packing(cfg: DictConfig, model: Any, *, alone: bool) -> None:
    """Leave `data.pack` out where the model shows that samples of a row would see each other.

    Args:
        alone: every rank has the weights, and finds the same. Raises ConfigError otherwise.
    """
    if cfg.data.get("pack") is None or (problem := model.find_packing_problem()) is None:
        return
    if not alone:
        raise ConfigError(f"data.pack: {problem}. Use data.pack=null and a larger batch.micro.")
    say_once(f"data.pack: {problem}. Rows hold one sample each, padded.")
    cfg.data.pack = None
