"""How many samples a run trains on: one rule for training and for the dry run. No torch import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig

from vlm_train.errors import ConfigError


def one_pass(cfg: DictConfig, samples: int, entry: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Training samples of one pass over a source, of `samples` in its shards: after both limits, less what `val_share`
    holds out, times its repeats. `entry` is that of `data.train`."""
    size = min([samples, *(limit for limit in (cfg.data.get("limit"), entry.get("limit")) if limit)])
    if (share := cfg.data.get("val_share")) and not cfg.data.get("val"):
        size -= max(1, int(size * share))
    return max(1, round(size * (entry.get("repeat") or 1.0)))


def planned_samples(cfg: DictConfig, train_samples: int, per_step: float | None = None) -> int:
    """Samples that the whole run trains on, the shorter of `trainer.epochs` and `trainer.max_steps`.

    Args:
        train_samples: those of one pass, see `one_pass`.
        per_step: samples per optimizer step; null: `batch.samples`.

    Raises:
        ConfigError: neither length is given.
    """
    limits = []
    if cfg.trainer.epochs is not None:
        limits.append(math.ceil(cfg.trainer.epochs * train_samples))
    if cfg.trainer.max_steps is not None:
        limits.append(math.floor(cfg.trainer.max_steps * (per_step or cfg.batch.samples)))
    if not limits:
        raise ConfigError(
            "trainer.epochs and trainer.max_steps are both null: give one of them, or training never ends"
        )
    return min(limits)
