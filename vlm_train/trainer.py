"""Configuration -> Lightning's Trainer: devices, precision, strategy, intervals, callbacks and loggers."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

from vlm_train.callbacks.accumulation import NEVER, Accumulation
from vlm_train.callbacks.loop import Checkpoints, Evaluation, Log
from vlm_train.callbacks.signals import StopSignals
from vlm_train.callbacks.watchdog import Watchdog
from vlm_train.checkpoint import Resume
from vlm_train.errors import ConfigError


def make_trainer(cfg: DictConfig, plan: Any, callbacks: list[Any], folder: Path) -> pl.Trainer:
    """The Lightning trainer of a planned run, with the configured callbacks before `callbacks`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    own = [instantiate(node, _convert_="all") for node in _named(cfg.callbacks)]
    loggers = [instantiate(node, _partial_=True, _convert_="all")(folder=folder) for node in _named(cfg.logger)]
    try:
        return pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=plan.world // cfg.launch.nodes,
            num_nodes=cfg.launch.nodes,
            strategy=_strategy(cfg, plan.world),
            precision="32-true" if cfg.trainer.precision == "bf16-true" else cfg.trainer.precision,
            plugins=[_environment(cfg)],
            max_steps=plan.steps,
            max_epochs=-1,
            gradient_clip_val=cfg.trainer.clip_norm,
            val_check_interval=NEVER,  # `Accumulation` says when; `_train` validates at the end
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=loggers,
            callbacks=[Accumulation(val_every=cfg.trainer.val_every), *own, *callbacks],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ConfigError(f"trainer.accelerator={cfg.trainer.accelerator}: {str(error).splitlines()[0]}") from error


def _environment(cfg: DictConfig) -> Any:
    """Who started the processes. Named here, because Lightning guesses, and requeues SLURM jobs behind our back."""
    if cfg.launch.kind == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def _strategy(cfg: DictConfig, world: int) -> Any:
    """The configured strategy; by default none for one process and DDP for several."""
    if cfg.strategy is not None:
        return instantiate(cfg.strategy, _convert_="all")
    return DDPStrategy(timeout=timedelta(minutes=cfg.launch.timeout_minutes)) if world > 1 else "auto"


def loop_callbacks(
    cfg: DictConfig, plan: Any, evaluation: Evaluation, folder: Path, facts: dict[str, Any], resumed: Resume | None
) -> list[Any]:
    """What happens at intervals. The log and the evaluators come before checkpoints, which must not lack their step.

    `facts` go into every checkpoint's manifest.
    """
    checkpoints = Checkpoints(
        folder,
        facts,
        every=cfg.trainer.save_every,
        val_every=None if evaluation.every else cfg.trainer.val_every,
        total=plan.steps,
        keep_last=cfg.trainer.keep_last,
        resumed=resumed.step if resumed else None,
    )
    watchdog = Watchdog(folder, minutes=cfg.trainer.watchdog_minutes)
    return [watchdog, StopSignals(), Log(every=cfg.trainer.log_every, total=plan.steps), evaluation, checkpoints]


def _named(group: DictConfig | None) -> list[DictConfig]:
    """The components of a group of named ones; a null entry removes one."""
    return [node for node in (group or {}).values() if node is not None]
