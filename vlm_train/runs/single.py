"""One command line: compose, check, carry out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import unknown_in
from vlm_train.config import folders, origins
from vlm_train.config.compose import compose_config, describe_replaced_data
from vlm_train.config.run_file import load_run
from vlm_train.config.run_identity import run_dir
from vlm_train.config.trust import check_environment_unread
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError
from vlm_train.runs import launch, process
from vlm_train.runs.folder import RunFolder

log = logging.getLogger("vlm_train")


def run(overrides: Sequence[str], dirs: Sequence[str | Path] = (), fresh: bool = False) -> dict[str, Any] | None:
    """Composes, checks and carries out one command line; `fresh` always does so in a new process tree."""
    if value_of(overrides, "schedule"):
        from vlm_train.runs import schedule

        return schedule.run_schedule(overrides, dirs)
    if value_of(overrides, "run"):
        cfg, found = from_run(overrides, dirs)
    else:
        cfg, found = compose_config(overrides, dirs), origins.find_origins(overrides, dirs)
    if cfg.mode == "config":
        print(origins.format_origins(cfg, found))
        return None
    if process_rank() == 0 and (note := describe_replaced_data(overrides, dirs)):
        log.warning("%s\n", note)
    check_config(cfg, need_assets=not cfg.dry_run and cfg.mode != "lengths")
    launch.check_environment(cfg)
    if cfg.mode == "fit" and not cfg.dry_run and process_rank() == 0:
        log.info("Run folder: %s\n%s\n", run_dir(cfg), origins.format_origins(cfg, found, only_changed=True))
        launch.prepare_folder(cfg, origins.format_origins(cfg, found))
    trains = cfg.mode in launch.PARALLEL_MODES and not cfg.dry_run
    own_tree = cfg.launch.devices > 1 or cfg.trainer.guard.rollback  # which can be started again
    if fresh or (trains and own_tree and launch.started_by() == "local"):
        return launch.run_child(cfg, cfg.launch.devices if trains else 1)
    return process.dispatch_mode(cfg)


def from_run(overrides: Sequence[str], dirs: Sequence[str | Path]) -> tuple[DictConfig, dict[str, origins.Origin]]:
    """The configuration of `run=<folder>` with this command line's groups and values on top, and its origins."""
    folder = Path(str(value_of(overrides, "run"))).absolute()
    run = RunFolder(folder)
    cfg = load_run(folder)
    cfg.allow_targets = []  # the folder may be somebody else's: trust is extended on the command line only
    found = {str(key): origins.Origin("run", str(run.config)) for key in cfg}
    if (run.tokenizer / "tokenizer.json").is_file():  # what the ids meant, wherever the shards are now
        cfg.tokenizer = {"_target_": "vlm_train.data.text.tokenizer.pretrained", "name": str(run.tokenizer)}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if override.key_or_group in folders.list_groups(dirs)]
    chosen = compose_config([str(override.input_line) for override in groups], dirs)
    for override in parsed:
        key = override.key_or_group
        if key in ("recipe", "size", "debug"):
            raise ConfigError(f"{key}: cannot be given with run=; {folder} brings its own configuration.")
        group = override in groups
        key = override.package or key  # +metric@eval.answers.metrics.cer=cer
        value = OmegaConf.select(chosen, key) if group else override.value()
        try:
            OmegaConf.update(cfg, key, value, merge=not group, force_add=str(override.input_line).startswith("+"))
        except (ConfigKeyError, ConfigAttributeError):
            raise ConfigError(unknown_in(key, cfg)) from None
        found[key] = origins.Origin(origins.COMMAND_LINE, origins.COMMAND_LINE)
    given = [key for key, origin in found.items() if origin.layer == origins.COMMAND_LINE]
    check_environment_unread(str(folder), cfg, given)
    cfg.run = str(folder)
    return cfg, found


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """The text that an override gives `key`, the last one winning."""
    found = [o.partition("=")[2] for o in overrides if o.partition("=")[0].lstrip("+") == key]
    return found[-1] if found and found[-1] not in ("null", "") else None
