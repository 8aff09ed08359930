"""How many samples a run trains on: one rule for training and for the dry run. No torch import."""

from __future__ import annotations

import math

from omegaconf import DictConfig

from vlm_train.errors import ConfigError


def one_pass(cfg: DictConfig, samples: int) -> int:
    """Training samples of one pass, of `samples` in the shards: after `data.limit`, less what `val_share` holds out."""
    limit, share = cfg.data.get("limit"), cfg.data.get("val_share")
    size = min(samples, limit) if limit else samples
    return size - max(1, int(size * share)) if share and not cfg.data.get("val") else size


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
