"""Mirrors that send their rows to a tracking service. Their libraries are imported when one is configured."""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlm_train.config.redact import without_credentials
from vlm_train.errors import ConfigError
from vlm_train.loggers.metrics_logger import ImageSample
from vlm_train.runs import record

STEP = "trainer/step"
"""The step axis of Weights & Biases, whose own steps may not go back, as a resumed run's do."""

_LOG_IN = "Run wandb login, or set logger.wandb.mode=offline."

MLFLOW_RECORD, MLFLOW_STORE, MLFLOW_FILES = "mlflow.json", "mlflow.db", "mlflow"
PARAMETERS = 100
"""Most parameters in one call of MLflow."""


class Wandb:
    """A run at Weights & Biases, online or in `<run>/wandb`, from where `wandb sync` sends it later."""

    def __init__(self, folder: Path, project: str, entity: str | None, tags: list[str] | None, mode: str) -> None:
        try:
            import wandb
            from wandb.errors import AuthenticationError, UsageError
        except ModuleNotFoundError as error:
            raise ConfigError("logger: wandb is not installed: pip install 'vlm-train[loggers]'.") from error
        self.module, name = wandb, folder.name
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "offline")
        elif mode == "online" and not wandb_key():
            raise ConfigError(f"logger.wandb: no API key. {_LOG_IN}")
        try:
            with _public_arguments():
                self.run: Any = wandb.init(
                    id=name,
                    name=name,
                    dir=folder,
                    project=project,
                    entity=entity,
                    tags=tags,
                    mode=mode,  # type: ignore[arg-type]
                    resume="allow",
                    reinit="finish_previous",  # another run of this process
                )
        except (AuthenticationError, UsageError) as error:
            said = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"logger.wandb: {said}. {_LOG_IN}") from error
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def config(self, content: Mapping[str, Any]) -> None:
        """Send the configuration as the run's config."""
        self.run.config.update(dict(content), allow_val_change=True)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Send a row; `STEP` is the axis of all curves."""
        self.run.log({**row, STEP: step})

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Send the pictures with their captions."""
        images = [self.module.Image(str(picture.path), caption=picture.caption) for picture in pictures]
        self.run.log({"predictions": images, STEP: step})

    def pause(self, *, good: bool) -> None:
        """The library ends the run when the process ends."""


def wandb_key() -> bool:
    """Whether a login is there, without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


@contextmanager
def _public_arguments() -> Iterator[None]:
    """Weights & Biases records the command line: without the credentials of addresses in it."""
    own = sys.argv
    sys.argv = without_credentials(own)
    try:
        yield
    finally:
        sys.argv = own


class MLflow:
    """A run of an MLflow experiment."""

    def __init__(self, folder: Path, experiment: str, tracking_uri: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a run waits while its rows are sent
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            import mlflow.tracking
        except ModuleNotFoundError as error:
            raise ConfigError("logger: MLflow is not installed: pip install 'vlm-train[loggers]'.") from error
        store = f"sqlite:///{folder.parent / MLFLOW_STORE}"
        address = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or store
        self.client = mlflow.tracking.MlflowClient(address)
        held = record.read_json(folder / MLFLOW_RECORD)
        place = {"tracking_uri": without_credentials(address), "experiment": experiment}
        if held.items() >= place.items() and self._go_on(str(held.get("run_id"))):
            return
        found = self.client.get_experiment_by_name(experiment)
        pictures = None if urlsplit(address).scheme in ("http", "https") else (folder.parent / MLFLOW_FILES).as_uri()
        number = found.experiment_id if found else self.client.create_experiment(experiment, pictures)
        self.id = self.client.create_run(number, run_name=folder.name).info.run_id
        record.write_json(folder / MLFLOW_RECORD, {**place, "run_id": self.id})

    def _go_on(self, run: str) -> bool:
        """Take up a run; False if the server no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self.id = run
        return True

    def config(self, content: Mapping[str, Any]) -> None:
        """Send the configuration as parameters. MLflow lets none be changed, so a resumed run adds the new ones."""
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        named = [(_mlflow_name(name), str(value)[:500]) for name, value in _flatten_leaves("", content)]
        new = [Param(name, value) for name, value in named if name not in known]
        for start in range(0, len(new), PARAMETERS):
            self.client.log_batch(self.id, params=new[start : start + PARAMETERS])

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Send all metrics of a row in one call."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(self.id, metrics=[Metric(_mlflow_name(name), row[name], now, step) for name in row])

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Send the pictures as artifacts, with a text of the answers."""
        folder = f"predictions/step-{step:08d}"
        for picture in pictures:
            self.client.log_artifact(self.id, str(picture.path), folder)
        self.client.log_text(self.id, json.dumps([p.caption for p in pictures], indent=1), f"{folder}/answers.json")

    def pause(self, *, good: bool) -> None:
        """The state that the server shows."""
        self.client.set_terminated(self.id, "FINISHED" if good else "FAILED")


def _flatten_leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value; a list is one value."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, item in value.items():
        yield from _flatten_leaves(f"{path}.{key}" if path else str(key), item)


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)


class Trackio:
    """A run of Trackio."""

    def __init__(self, folder: Path, project: str, space: str | None) -> None:
        try:
            self.module: Any = import_module("trackio")
        except ModuleNotFoundError as error:
            raise ConfigError("logger: Trackio is not installed: pip install trackio.") from error
        self.run: Any = self.module.init(project, name=folder.name, space_id=space, resume="allow", embed=False)

    def config(self, content: Mapping[str, Any]) -> None:
        """Keep the configuration as the run's config, which Trackio sends with the first row."""
        self.run.config.update({name: str(value) for name, value in _flatten_leaves("", content)})

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """At its step, which may go back."""
        self.run.log(dict(row), step=step)

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Send the pictures with their captions."""
        images = {f"predictions/{n}": self.module.Image(str(p.path), caption=p.caption) for n, p in enumerate(pictures)}
        self.run.log(images, step=step)

    def pause(self, *, good: bool) -> None:
        """The library ends the run when the process ends."""
