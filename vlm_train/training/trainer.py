"""Configuration -> Lightning's Trainer: devices, precision, strategy, intervals, callbacks and loggers."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from vlm_train.build import build_callbacks, build_loggers, build_strategy
from vlm_train.checkpoint.resume import Resume
from vlm_train.checkpoint.save import CheckpointWriter, Keep
from vlm_train.config.signatures import import_target
from vlm_train.contracts.evaluator import validation_metrics
from vlm_train.errors import ConfigError
from vlm_train.models.precision import halve_frozen
from vlm_train.runs.folder import RunFolder
from vlm_train.training.callbacks.loop import AfterStep, Checkpoints, Evaluation
from vlm_train.training.callbacks.progress import ProgressBar
from vlm_train.training.callbacks.signals import StopSignals
from vlm_train.training.callbacks.watchdog import Watchdog
from vlm_train.training.device import keep_freed_memory

SINGLE = "vlm_train.training.strategies.replicated.Single"
DDP = "vlm_train.training.strategies.replicated.DDP"


def make_trainer(cfg: DictConfig, plan: Any, strategy: Any, callbacks: list[Any], folder: Path) -> pl.Trainer:
    """The Lightning trainer of a planned run, with the configured callbacks before `callbacks`."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not on_gpu(cfg):
        keep_freed_memory()
    try:
        return pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=plan.world // cfg.launch.nodes,
            num_nodes=cfg.launch.nodes,
            strategy=strategy,
            **_precision_plugin(cfg, strategy),
            max_steps=plan.steps,
            max_epochs=-1,
            check_val_every_n_epoch=sys.maxsize,  # never by itself: `AfterStep` validates
            num_sanity_val_steps=0,
            logger=build_loggers(cfg, folder),
            callbacks=[*build_callbacks(cfg), *callbacks],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ConfigError(f"trainer.accelerator={cfg.trainer.accelerator}: {str(error).splitlines()[0]}") from error


def _cluster_environment(cfg: DictConfig) -> Any:
    """Who started the processes. Named here, because Lightning guesses, and requeues SLURM jobs behind our back."""
    if cfg.launch.kind == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def make_strategy(cfg: DictConfig, world: int) -> Any:
    """The configured strategy; by default one device for one process and DDP for several."""
    options = dict(cfg.strategy or {"_target_": DDP if world > 1 else SINGLE})
    given = {
        "device": "cuda:0" if on_gpu(cfg) else "cpu",
        "timeout_minutes": cfg.launch.timeout_minutes,
        "compute_dtype": {"bf16-mixed": "bf16"}.get(cfg.trainer.precision),
    }
    known = inspect.signature(import_target(options["_target_"])).parameters
    strategy = build_strategy(OmegaConf.create(options | {name: given[name] for name in given if name in known}))
    if world > 1 and not strategy.spans_processes:
        raise ConfigError(
            f"strategy: {type(strategy).__name__} trains on one device, but {world} processes are started. Use ddp."
        )
    return strategy


def on_gpu(cfg: DictConfig) -> bool:
    """Whether training runs on CUDA devices."""
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()


def halves_weights(cfg: DictConfig, strategy: Any) -> bool:
    """Whether weights and optimizer are kept in 16 bits."""
    return cfg.trainer.precision == "bf16-true" and not strategy.keeps_fp32_copy


def halve_parts(cfg: DictConfig, strategy: Any, *models: Any) -> None:
    """Keep frozen layers of the models (None: there is none) in the 16 bits that they multiply with, if
    `trainer.halve_frozen` says so and the strategy does not cast weights itself."""
    casts = strategy.keeps_fp32_copy or strategy.compute_dtype is not None or strategy.shards_model
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.trainer.precision)
    if dtype is None or casts or not cfg.trainer.halve_frozen:
        return
    for model in models:
        if model is not None:
            halve_frozen(model, dtype)


def _precision_plugin(cfg: DictConfig, strategy: Any) -> dict[str, Any]:
    """The precision for Lightning: the strategy's own plugin, or 32-true if the weights already have their type."""
    precision, environment = cfg.trainer.precision, _cluster_environment(cfg)
    if (own := strategy.make_precision(precision)) is not None:
        return {"plugins": [environment, own]}
    has_type = halves_weights(cfg, strategy) or strategy.compute_dtype is not None
    return {"plugins": [environment], "precision": "32-true" if has_type else precision}


def loop_callbacks(
    cfg: DictConfig,
    plan: Any,
    module: Any,
    evaluation: Evaluation,
    facts: dict[str, Any],
    resumed: Resume | None,
    *,
    held_out: bool,
) -> list[Any]:
    """The callbacks that watch a run and act at intervals.

    Args:
        facts: go into every checkpoint's manifest.
        held_out: whether there are samples for a held-out loss.
    """
    settings = cfg.trainer
    higher_is_better = {"loss": False, **validation_metrics(evaluation.evaluators)}
    lower = not higher_is_better[settings.best]
    keep = Keep(settings.keep_last, settings.keep_best, settings.keep_every, lower=lower)
    writer = CheckpointWriter(
        RunFolder(module.folder).checkpoints, keep, background=settings.async_save, agree=module.over_ranks
    )
    checkpoints = Checkpoints(writer, facts, metric=settings.best, total=plan.steps, resumed=resumed)
    after_step = AfterStep(
        evaluation,
        checkpoints,
        log_every=settings.log_every,
        val_every=settings.val_every,
        save_every=settings.save_every,
        total=plan.steps,
        held_out=held_out,
    )
    bar = [ProgressBar(plan.steps)] if sys.stdout.isatty() else []
    watchdog = Watchdog(module.folder, minutes=settings.watchdog_minutes)
    return [watchdog, StopSignals(module.folder), checkpoints, after_step, *bar]
