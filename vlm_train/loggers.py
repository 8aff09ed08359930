"""Loggers besides metrics.jsonl, which is the record of truth and always written. `fit` gives the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def tensorboard(*, folder: Path) -> Logger:
    """Event files in `<run>/tensorboard`; a resumed run goes on in the same folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ConfigError("logger: TensorBoard is not installed: pip install 'vlm-train[loggers]'.") from error


def wandb(
    *,
    folder: Path,
    project: str = "vlm-train",
    entity: str | None = None,
    tags: list[str] | None = None,
    mode: Literal["online", "offline"] = "online",
) -> Logger:
    """Weights & Biases. The run's id is its folder's name, so that a resumed run goes on in the same curves."""
    from lightning.pytorch.loggers import WandbLogger

    name = folder.name
    try:
        logger = WandbLogger(
            name=name,
            id=name,
            save_dir=folder,
            project=project,
            entity=entity,
            tags=tags,
            offline=mode == "offline",
            resume="allow",
        )
    except ModuleNotFoundError as error:
        raise ConfigError("logger: wandb is not installed: pip install 'vlm-train[loggers]'.") from error
    from wandb.errors import Error

    try:
        _ = logger.experiment  # logs in, on rank 0, before anything is trained
    except Error as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"logger.wandb: {said}. Run wandb login, or set logger.wandb.mode=offline.") from error
    return logger
