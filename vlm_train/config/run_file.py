"""The configuration file of a run folder."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.atomic_write import atomic_write
from vlm_train.config.moved_targets import rename_targets
from vlm_train.config.renamed_keys import rename_keys
from vlm_train.config.schema import Root
from vlm_train.errors import ConfigError

LAST = "target"
"""The last key that every version has written: a file without it was cut off."""


def load_config(path: str | Path) -> DictConfig:
    """A configuration file read as data into the typed root. Raises ConfigError when it is missing or damaged, or does
    not fit."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"run: {path} does not exist. Expected a run folder with its config.yaml.")
    try:
        cfg = OmegaConf.structured(Root)
        saved = OmegaConf.to_container(rename_targets(OmegaConf.load(path)), resolve=False)
        if isinstance(saved, dict):
            rename_keys(saved)
        cfg.merge_with(saved)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(_describe_damage(path, f"{type(error).__name__}")) from error
    except (OmegaConfBaseException, ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(saved, dict) or LAST not in saved:
        raise ConfigError(_describe_damage(path, "it is cut off" if saved else "it is empty"))
    OmegaConf.set_struct(cfg, True)
    return cfg


def load_run(folder: Path) -> DictConfig:
    """The configuration of a run folder, which may have been moved: a run that it started from, and that is not where
    it was, is looked for beside it.

    Raises:
        ConfigError: see `load_config`.
    """
    cfg = load_config(folder / "config.yaml")
    for source in [*cfg.init_from, *(cfg.reference.init_from or [])]:
        if not OmegaConf.is_missing(source, "run") and not Path(source.run).exists():
            parts = Path(source.run).parts
            tails = (folder.absolute().parent.joinpath(*parts[start:]) for start in range(1, len(parts)))
            source.run = next((str(path) for path in tails if path.exists()), source.run)
    return cfg


def _describe_damage(path: Path, how: str) -> str:
    again = "the command that trained this run writes it anew once the file is deleted, and resumes"
    return f"{path}: no configuration of a run: {how}. Restore it from a copy; or {again}."


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Writes `cfg` with its interpolations kept, so that no secret of the environment reaches the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=False))
