"""A copy of metrics.jsonl elsewhere, in the shape that Lightning knows, which no failure of it can stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger

from vlm_train.config.redact import without_credentials
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError

MOST = 10_000
"""Rows that wait for a logger that cannot be reached; older ones are only in metrics.jsonl."""

PAUSE, PATIENCE = 60.0, 20
"""A logger that failed is left alone for a minute, or so many times as long as its failing took: however long its
library waits for a server, a run loses no more than a twentieth of its time to it."""


@dataclass(frozen=True)
class ImageSample:
    """A sample prediction: a PNG of the run folder and the words below it."""

    path: Path
    caption: str


class Backend(Protocol):
    """Where a logger's rows go. Any method may raise anything."""

    def config(self, content: Mapping[str, Any]) -> None:
        """The configuration of the run: nested, plain, without secrets."""
        ...

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Values of one split after an optimizer step; a name is `<split>/<metric>`."""
        ...

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Send sample predictions."""
        ...

    def pause(self, *, good: bool) -> None:
        """Training has ended, well or with an error. More rows may come."""
        ...


class MetricsLogger(Logger):
    """Passes rows on to a backend, on rank 0. What fails is said once, waits, and is tried again later.

    Args:
        label: its name in the configuration.
        connect: opens the backend. ConfigError (not installed, not logged in) stops the run before it trains; any other
            error, such as a server that is away, only leaves the logger behind.
    """

    def __init__(self, label: str, connect: Callable[[], Backend], *, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.label, self._connect, self._clock = label, connect, clock
        self._backend: Backend | None = None
        self._waiting: deque[Callable[[Backend], None]] = deque(maxlen=MOST)
        self._behind, self._next = False, float("-inf")
        if process_rank() == 0:
            self._send_waiting()

    @property
    def name(self) -> str:
        """The name of the logger, which Lightning asks for."""
        return self.label

    @property
    def version(self) -> str:
        """An empty version, which Lightning asks for."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration, as a plain mapping with its interpolations kept."""
        self._queue_action(lambda backend: backend.config(without_credentials(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue a row for `Backend.row`."""
        self._queue_action(lambda backend: backend.row(step or 0, metrics))

    def log_images(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Sample predictions, see `Backend.pictures`."""
        self._queue_action(lambda backend: backend.pictures(step, pictures))

    def finalize(self, status: str) -> None:
        """Called by Lightning at the end of a loop: the last chance of what waits."""
        self._next = float("-inf")
        self._queue_action(lambda backend: backend.pause(good=status in ("success", "finished")))

    def _queue_action(self, action: Callable[[Backend], None]) -> None:
        if process_rank() == 0:
            self._waiting.append(action)
            self._send_waiting()

    def _send_waiting(self) -> None:
        start = self._clock()
        if start < self._next:
            return
        try:
            self._backend = self._backend or self._connect()
            while self._waiting:
                self._waiting[0](self._backend)
                self._waiting.popleft()
        except ConfigError:
            raise
        except Exception as error:  # of any library, network or disk
            now = self._clock()
            self._next = now + max(PAUSE, PATIENCE * (now - start))
            if not self._behind:
                print(f"logger.{self.label}: {_describe_error(error)}; metrics.jsonl continues", flush=True)
            self._behind = True
        else:
            if self._behind:
                print(f"logger.{self.label}: works again", flush=True)
            self._behind = False


def _describe_error(error: Exception) -> str:
    """The first line of an error, without credentials of the address it may name."""
    text = (str(error).splitlines() or [""])[0].strip().rstrip(".")
    return str(without_credentials(f"{type(error).__name__}: {text}" if text else type(error).__name__))
