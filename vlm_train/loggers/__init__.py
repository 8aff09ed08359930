"""Mirrors of metrics.jsonl, which is the record of truth and always written. `fit` gives the run folder.

Every logger goes on in the same place when its run is resumed, and none can stop a run: see `metrics_logger.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vlm_train.loggers.metrics_logger import MetricsLogger


def csv(*, folder: Path) -> MetricsLogger:
    """`<run>/metrics.csv`: the lines of metrics.jsonl as a table, with a column for every name that ever appeared."""
    from vlm_train.loggers.files import Csv
    from vlm_train.loggers.metrics_logger import MetricsLogger

    return MetricsLogger("csv", partial(Csv, folder))


def tensorboard(*, folder: Path) -> MetricsLogger:
    """Event files in `<run>/tensorboard`; a resumed run goes on in the same curves."""
    from vlm_train.loggers.files import TensorBoard
    from vlm_train.loggers.metrics_logger import MetricsLogger

    return MetricsLogger("tensorboard", partial(TensorBoard, folder))


def wandb(
    *,
    folder: Path,
    project: str = "vlm-train",
    entity: str | None = None,
    tags: list[str] | None = None,
    mode: Literal["auto", "online", "offline"] = "auto",
) -> MetricsLogger:
    """Weights & Biases. The run's id is its folder's name, so that a resumed run goes on in the same curves.

    Args:
        entity: team; None: your default.
        mode: `auto` is offline unless a key is there (`wandb login`, WANDB_API_KEY). Nothing ever asks for one.
    """
    from vlm_train.loggers.metrics_logger import MetricsLogger
    from vlm_train.loggers.servers import Wandb

    return MetricsLogger("wandb", partial(Wandb, folder, project, entity, tags, mode))


def mlflow(*, folder: Path, experiment: str = "vlm-train", tracking_uri: str | None = None) -> MetricsLogger:
    """MLflow. The id that the server gives the run is kept in `<run>/mlflow.json`, so that a resumed run goes on in it.

    Args:
        tracking_uri: of the server; None: MLFLOW_TRACKING_URI, else the file `mlflow.db` beside the run folder.
    """
    from vlm_train.loggers.metrics_logger import MetricsLogger
    from vlm_train.loggers.servers import MLflow

    return MetricsLogger("mlflow", partial(MLflow, folder, experiment, tracking_uri))


def trackio(*, folder: Path, project: str = "vlm-train", space: str | None = None) -> MetricsLogger:
    """Trackio, on this machine (`trackio show`) or in a Hugging Face Space. The run has its folder's name.

    Args:
        space: `user/name` of the Space, made where it is missing; None: this machine.
    """
    from vlm_train.loggers.metrics_logger import MetricsLogger
    from vlm_train.loggers.servers import Trackio

    return MetricsLogger("trackio", partial(Trackio, folder, project, space))
