"""How long a run is and what it leaves on disk, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipelines.manifest import MANIFEST, Manifest
from vlm_train.length import one_pass, planned_samples
from vlm_train.optim import warmup_length


@dataclass(frozen=True)
class Length:
    """Samples of one pass and optimizer steps of the whole run; None where nothing says how many samples there are."""

    samples: int | None
    steps: int | None
    warmup_steps: int | None


def length(cfg: DictConfig, tokens_per_sample: int) -> Length:
    """Optimizer steps from samples, batch and epochs; `tokens_per_sample` serves a batch given in tokens."""
    samples, steps = _samples(cfg), cfg.trainer.max_steps
    if samples is not None:
        per_step = cfg.batch.samples or max(cfg.batch.tokens / tokens_per_sample, 1)
        steps = math.ceil(planned_samples(cfg, samples, per_step) / per_step)
    return Length(samples, steps, None if steps is None else _warmup(cfg, steps))


def _warmup(cfg: DictConfig, steps: int) -> int:
    schedule: Any = cfg.lr_schedule or {}
    return warmup_length(
        steps, warmup_ratio=schedule.get("warmup_ratio") or 0.0, warmup_steps=schedule.get("warmup_steps")
    )


def _samples(cfg: DictConfig) -> int | None:
    """Training samples of one pass over all sources: by the shards' own count, or the published one."""
    total = 0
    for source in cfg.data.train:
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


def disk(cfg: DictConfig, trainable: int, states: int) -> Disk:
    """Frozen parameters are never saved: the manifest names where they came from. bf16-true keeps 16 bits of all."""
    size = 2 if cfg.trainer.precision == "bf16-true" else 4
    checkpoint = trainable * size * (1 + states)
    return Disk(checkpoint, checkpoint * (cfg.trainer.keep_last + 1))  # besides the newest ones the best
