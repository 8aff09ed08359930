"""How long a run is and what it leaves on disk, from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig

from data_pipelines.shards.manifest import MANIFEST, Manifest
from vlm_train.errors import ConfigError
from vlm_train.training.optim import warmup_length


@dataclass(frozen=True)
class Length:
    """Samples of one pass and optimizer steps of the whole run; None where nothing says how many samples there are."""

    samples: int | None
    steps: int | None
    warmup_steps: int | None


def predict_length(cfg: DictConfig, tokens_per_sample: int) -> Length:
    """Optimizer steps from samples, batch and epochs; `tokens_per_sample` serves a batch given in tokens."""
    samples, steps = _count_samples(cfg), cfg.trainer.max_steps
    if samples is not None:
        per_step = cfg.batch.samples or max(cfg.batch.tokens / tokens_per_sample, 1)
        steps = math.ceil(planned_samples(cfg, samples, per_step) / per_step)
    return Length(samples, steps, None if steps is None else _warmup_steps(cfg, steps))


def _warmup_steps(cfg: DictConfig, steps: int) -> int:
    schedule: Any = cfg.lr_schedule or {}
    return warmup_length(
        steps, warmup_ratio=schedule.get("warmup_ratio") or 0.0, warmup_steps=schedule.get("warmup_steps")
    )


def _count_samples(cfg: DictConfig) -> int | None:
    """Training samples of one pass over all sources: by the shards' own count, or the published one;
    None where nothing says it."""
    total = 0
    for source in cfg.data.train:
        if "tars" in source:
            return None
        folder = Path(str(source.shards))
        count = Manifest.read(folder).samples if (folder / MANIFEST).is_file() else source.get("samples")
        if count is None:
            return None
        total += one_pass(cfg, count, source)
    return total


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint and of all that are kept: what learned and its optimizer state, each once."""

    checkpoint: int
    kept: int


def predict_disk(cfg: DictConfig, trainable: int, states: int) -> Disk:
    """Frozen parameters are never saved: the manifest names where they came from. bf16-true keeps 16 bits of all."""
    size = 2 if cfg.trainer.precision == "bf16-true" else 4
    checkpoint = trainable * size * (1 + states)
    return Disk(checkpoint, checkpoint * (cfg.trainer.keep_last + 1))  # besides the newest ones the best


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
